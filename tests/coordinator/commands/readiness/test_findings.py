"""What would keep a run from starting is found before anybody is greeted, and nothing is run."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.commands.readiness.findings import check_report_to
from coordinator.config.run import ServeConfig
from coordinator.config.tracking import TrackingConfig
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.transport.keys import create_key_pair, make_key_pair
from tests.tiny import make_config

PROFILE = {
    "memory_bytes": 1e9,
    "overhead_bytes": 1e6,
    "flops_per_s": 1e8,
    "up_bytes_per_s": 1e6,
    "down_bytes_per_s": 1e6,
    "round_trip_s": 0.01,
}


class Bench:
    """A run that could start, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_config("llama").save_pretrained(folder / "model")
        create_key_pair(folder / "coordinator.key")
        AllowList(folder / "devices.yaml").register("cam", make_key_pair().public)
        (folder / "dev.jsonl").write_text('{"text": "one two"}\n', "utf-8")
        (folder / "cam.json").write_text(json.dumps(PROFILE), "utf-8")
        self.settings: dict[str, Any] = {
            "model": str(folder / "model"),
            "listen": "tcp://127.0.0.1:*",
            "secret_key": "coordinator.key",
            "allow_list": "devices.yaml",
            "runs": "runs",
            "name": "first",
            "rounds": 2,
            "steps_per_round": 3,
            "max_length": 16,
            "devices": {"cam": {"split": 2}},
            "evaluation": {"data": {"path": str(folder / "dev.jsonl")}},
            "planning": {"server_flops_per_s": 1e9, "server_memory_bytes": 1e9},
        }

    def check(self, *words: str, command: tuple[str, ...] = ("check",)) -> int:
        """Run the command; return how it ended."""
        (self.folder / "run.yaml").write_text(json.dumps(self.settings), "utf-8")
        return main([*command, "--config", str(self.folder / "run.yaml"), *words])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A run that could start."""
    return Bench(tmp_path)


def test_a_run_that_can_start(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Every check is fine, memory, bytes and time are told, and no folder of a run is made."""
    profiles = ["--profiles", str(bench.folder / "cam.json")]

    assert bench.check(*profiles) == 0
    one = capsys.readouterr().out
    assert bench.check(*profiles, command=("serve", "--check")) == 0
    other = capsys.readouterr().out

    assert [line.split("(")[0] for line in one.splitlines() if "split " not in line] == [
        line.split("(")[0] for line in other.splitlines() if "split " not in line
    ]
    checks = [line.split()[1] for line in one.splitlines() if line.startswith("ok ")]
    assert checks == [
        "run",
        "keys",
        "devices",
        "port",
        "planning",
        "data",
        *["memory"] * 2,
        "bytes",
        "time",
    ]
    assert "cam, 2 blocks: " in one
    assert not (bench.folder / "runs").exists()


def _no_key(bench: Bench) -> None:
    bench.settings["secret_key"] = "absent.key"


def _bad_data(bench: Bench) -> None:
    (bench.folder / "dev.jsonl").write_text('{"text": "a"}\n' * 1500 + '{"text"\n', "utf-8")


def _taken_name(bench: Bench) -> None:
    (bench.folder / "runs" / "first" / "checkpoint-000001").mkdir(parents=True)


def _little_memory(bench: Bench) -> None:
    (bench.folder / "cam.json").write_text(json.dumps({**PROFILE, "memory_bytes": 2**20}), "utf-8")


def _bad_list(bench: Bench) -> None:
    (bench.folder / "devices.yaml").write_text("kitchen", "utf-8")


FAILURES: dict[str, tuple[Callable[[Bench], None], int, str]] = {
    "no key": (_no_key, 2, "absent.key"),
    "bad data behind the first thousand rows": (_bad_data, 7, "dev.jsonl:1501: not JSON"),
    "a name that is taken": (_taken_name, 2, "coordinator resume "),
    "too little memory": (_little_memory, 6, "MiB of 1: too much"),
    "no list": (_bad_list, 2, "is not a list of devices"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_would_end_a_run_is_told_with_its_exit_code(
    case: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """One failure is named, with what mends it, and all other checks are there all the same."""
    change, code, words = FAILURES[case]
    change(bench)

    assert bench.check("--profiles", str(bench.folder / "cam.json")) == code

    said = capsys.readouterr().out
    assert words in said
    assert said.count("failure  ") == 1


def test_what_report_to_lacks_is_said_before_a_run(tmp_path: Path) -> None:
    """Each tracker is looked at: a token that is not there fails, what needs nothing is fine."""
    tracking = TrackingConfig(prometheus_token=tmp_path / "none")
    config = ServeConfig(model="m", report_to=("csv", "prometheus"), tracking=tracking)

    lacks = check_report_to(config)
    fine = check_report_to(replace(config, tracking=TrackingConfig()))

    assert lacks.status == "failure"
    assert lacks.text.endswith(f"{tmp_path / 'none'}: No such file or directory")
    assert (fine.status, fine.text) == ("ok", "csv, prometheus")


def test_scores_that_nothing_counts(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Java a score that needs it is a failure that says so; others are counted."""
    wanted = [bench.check(f"evaluation.scores={names}") for names in ("[bleu]", "[bleu, meteor]")]
    monkeypatch.setenv("PATH", str(bench.folder))
    lacking = [bench.check(f"evaluation.scores={names}") for names in ("[bleu]", "[bleu, meteor]")]

    assert (wanted, lacking) == ([0, 0], [0, 2])
    assert "meteor needs Java" in capsys.readouterr().out


def test_a_port_that_is_taken(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Another program there is a failure; the same port is fine when that has gone."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = bench.check(f"listen=tcp://127.0.0.1:{port}")
    free = bench.check(f"listen=tcp://127.0.0.1:{port}")

    assert (taken, free) == (2, 0)
    assert f"tcp://127.0.0.1:{port}: Address already in use" in capsys.readouterr().out


def test_an_address_of_the_page_that_is_taken(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a failure by name, before a run begins, and fine when it is free again."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        page = f"127.0.0.1:{other.getsockname()[1]}"
        taken = bench.check(f"page={page}")
    free = bench.check(f"page={page}")

    assert (taken, free) == (2, 0)
    said = capsys.readouterr().out
    assert f"page: cannot listen at {page}: Address already in use" in said
    assert f"http://{page}/ is free" in said


def test_devices_that_are_not_registered(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """They are a warning, as they may be registered while the run waits."""
    bench.settings["devices"] = {"came": {"split": 1}}

    assert bench.check() == 0
    assert bench.check("min_devices=2") == 0

    said = capsys.readouterr().out
    assert "; came: in the config, not in that list" in said
    assert "1 registered in " in said
    assert "it would wait for more" in said


def test_what_is_unknown_has_its_reason(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Without profiles and the coordinator's speed there is no time, and it is said why."""
    bench.settings["planning"] = {}

    assert bench.check() == 0

    said = " ".join(capsys.readouterr().out.split())
    assert (
        "cam's speed, which it measures when it joins; `profiler measure --write cam.json" in said
    )
    assert "its link, which is measured when it joins; --link cam:LINK assumes one" in said
    assert "the coordinator's speed, which it measures when it serves" in said


def test_boards_and_links_stand_for_what_is_not_measured(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a board for each machine and a link nothing of the run's time is unknown."""
    bench.settings["planning"] = {}
    named = ["--board", "cam:jetson-nano", "--link", "4g-good", "--coordinator", "h100-80gb"]

    assert bench.check(*named) == 0

    said = capsys.readouterr().out
    assert "not known" not in said
    assert "time      about " in said


def test_a_plan_that_is_fixed_by_hand_is_told(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """A split of the config that wins over a method is a warning, with what undoes it."""
    bench.settings["devices"] = {"cam": {"split": 2}}

    assert bench.check("planning.split=armsc") == 0
    assert bench.check("planning.split=armsc", "devices.cam.split=null") == 0

    first, second = capsys.readouterr().out.split("checks:")[:2]
    assert "devices.cam.split: 2 stands in the config" in " ".join(first.split())
    assert "devices.cam.split=null lets it" in " ".join(first.split())
    assert "stands in the config" not in second


def test_profiles_belong_to_a_check(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is served takes no profiles from files, and says so instead of ignoring them."""
    profile = str(bench.folder / "cam.json")

    assert main(["serve", "--profiles", profile, "model=x"]) == 2
    assert "these are for --check" in capsys.readouterr().err
