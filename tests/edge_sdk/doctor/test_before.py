"""`edge-sdk check`: what would keep a device out of a run, and what of a model would fit it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.cli import main
from edge_sdk.transport.keys import create_key_pair
from tests.tiny import BLOCKS, make_config


class Bench:
    """A device that could take part, but for a coordinator, which is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_config("llama").save_pretrained(folder / "model")
        create_key_pair(folder / "device.key")
        create_key_pair(folder / "coordinator.key")
        (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8")
        self.words = [
            "coordinator=tcp://127.0.0.1:1",
            f"secret_key={folder / 'device.key'}",
            f"server_key={folder / 'coordinator.key.pub'}",
            f"data.path={folder / 'train.jsonl'}",
            "profile.memory_bytes=1e9",
            "profile.overhead_bytes=1e6",
            "device=cpu",
        ]

    def check(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
        """Run the command; return its exit code, and status and text of each check."""
        model = ["--model", str(self.folder / "model")]
        code = main(["check", "--format", "json", *model, *self.words, *words])
        found = json.loads(capsys.readouterr().out)
        return code, {one["check"]: f"{one['status']}: {one['text']}" for one in found}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A device that could take part."""
    return Bench(tmp_path)


def test_all_that_needs_no_coordinator_is_fine(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Config, keys, data, model, memory and bytes; that nobody answers is the only failure."""
    code, found = bench.check(capsys)

    assert code == 3
    assert {name for name, text in found.items() if text.startswith("failure")} == {"reach"}
    assert found["data"].endswith("all rows are of the schema text; 2 to train, 0 to validate")
    assert f"1-{BLOCKS} of {BLOCKS} blocks can run here" in found["model"]
    assert f"up to {BLOCKS} blocks fit: " in found["memory"]
    assert found["time"].startswith("skipped")


def test_a_profile_tells_the_time(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the speed is half the time; what the config says by hand wins over the file."""
    (bench.folder / "me.json").write_text('{"flops_per_s": 1e8}', "utf-8")
    profile = ["--profile", str(bench.folder / "me.json")]

    _, slow = bench.check(capsys, *profile)
    _, fast = bench.check(capsys, *profile, "profile.flops_per_s=2e8")

    first, second = (float(one["time"].split()[1]) for one in (slow, fast))
    assert first == pytest.approx(2 * second, rel=0.1)


def _bad_row(bench: Bench) -> list[str]:
    rows = '{"text": "a"}\n' * 1500 + '{"text"\n'
    (bench.folder / "train.jsonl").write_text(rows, "utf-8")
    return []


FAILURES: dict[str, tuple[Callable[[Bench], list[str]], int, str, str]] = {
    "no key": (lambda _: ["secret_key=absent.key"], 2, "keys", "no secret key at absent.key"),
    "a bad row behind the first thousand": (_bad_row, 7, "data", "train.jsonl:1501: not JSON"),
    "no memory": (lambda _: ["profile.memory_bytes=1e6"], 6, "memory", "1 blocks need "),
    "a wrong setting": (lambda _: ["patience_s=-1"], 2, "config", "patience_s"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_would_end_a_run_is_told_with_its_exit_code(
    case: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check is named, and the program ends as a run would."""
    change, code, check, words = FAILURES[case]

    ended, found = bench.check(capsys, *change(bench))

    assert ended == code
    assert found[check].startswith("failure: ")
    assert words in found[check]


def test_a_demand_that_does_not_fit_is_a_warning(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where `accept.min_split` asks for more blocks than fit, no plan can satisfy it."""
    _, roomy = bench.check(capsys, "accept.min_split=all")
    needs = float(roomy["memory"].split("fit: ")[1].split()[0].replace(",", ""))
    _, tight = bench.check(
        capsys, "accept.min_split=all", f"profile.memory_bytes={(needs - 0.7) * 2**20}"
    )

    assert roomy["memory"].startswith("ok")
    assert tight["memory"].startswith("warning")
    assert "accept.min_split is all" in tight["memory"]
