"""`coordinator audit-privacy`: numbers of real attacks on a terminal, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.config.run import DeviceSettings
from coordinator.lab.privacy.config import CODECS
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.run import simulate
from coordinator.results.watchers import Watchers
from edge_sdk.data.rows import DataConfig
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import classified, save_model, sentences, write_rows
from tests.tiny import BLOCKS, CLASSES

# peft's own, while a simulated run's adapter is read back.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FAST = ("--public-tokens", "1500", "--tokens", "300", "--search", "20")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions."""
    rows = [
        {"prompt": row["text"], "completion": other["text"]}
        for row, other in zip(sentences(1, 60), sentences(2, 60), strict=True)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def audit(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Run the command; returns what it printed, or its one line of error."""
    capsys.readouterr()
    assert main(["audit-privacy", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    if code:
        assert len(captured.err.strip().splitlines()) == 1, captured.err
        return captured.err
    return captured.out


def test_the_numbers_as_json(llama: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every split, codec and attack; embeddings and float32 gradients tell everything."""
    options = ["--model", llama, "--data", pairs, "--codecs", "float32", "int2", *FAST]

    found = json.loads(audit(capsys, *options, "--format", "json"))
    again = json.loads(audit(capsys, *options, "--format", "json"))

    where = {(cell["split"], cell["codec"], cell["attack"]) for cell in found["cells"]}
    attacks = ("embedding", "state", "inverter", "search")
    assert where == {(0, "float32", "embedding")} | {
        (split, codec, attack)
        for split in range(1, BLOCKS)
        for codec in ("float32", "int2")
        for attack in attacks
    }
    assert found["cells"][0]["found"]["prompts"]["top1"] == 1.0
    assert found["labels"][0]["found"]["top1"] == 1.0
    assert found["told"]["exact"] == 1.0
    assert found["baseline"]["prompts"]["top1"] < 0.5
    assert found["baseline"]["prompts"]["tokens"] == found["cells"][0]["found"]["prompts"]["tokens"]
    assert found["suggested"]["min_split"] == max(found["suggested"]["least_split"].values())
    assert found["known_from"] == "the other half of the sample"
    assert found == again


def test_the_numbers_as_text_and_page(
    llama: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables for people, a suggestion, and with --out a page with its picture."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "audit"
    options = ["--splits", "1", "3", "--codecs", "int8", "--share", "0.9", "--out", out, *FAST]

    text = audit(capsys, "--model", llama, "--data", pairs, "--public", pairs, *options)

    assert "prompts from hidden states: tokens recovered by the best attack" in text
    assert "targets from the top gradient" in text
    assert f"public text: {pairs}" in text
    assert "accept.min_split" in text
    assert "a stronger one recovers more" in text
    names = {path.name for path in out.iterdir()}
    assert names == {"audit.json", "audit.md", "recovery.png", "report.html", "table.md"}
    assert (out / "recovery.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "audit.json").read_text())["num_blocks"] == BLOCKS


def test_a_run_is_audited_with_what_it_has_learned(
    llama: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks that adapters have changed give other states than those of the model alone."""
    data = DataConfig(path=str(pairs))
    fleet = FleetConfig(devices={"n": SimulatedDeviceConfig(count=2)}, data=data)
    config = SimulationConfig(
        model=str(llama),
        runs=tmp_path,
        name="run",
        rounds=2,
        steps_per_round=2,
        default=DeviceSettings(split=2, batch_size=4, codec="float32"),
        lora=LoraConfig(r=4, lora_alpha=8),
        training=TrainingConfig(learning_rate=5e-2),
        device="cpu",
        simulation=fleet,
    )
    simulate(config, Watchers())
    options = ["--data", pairs, "--codecs", "float32", "--format", "json", *FAST]

    run = json.loads(audit(capsys, "--run", tmp_path / "run", *options))
    base = json.loads(audit(capsys, "--model", llama, *options))

    assert run["learned"] == "2 rounds of run run"
    assert run["tokens"] == base["tokens"]
    assert run["cells"][0] == base["cells"][0]
    assert run["cells"][1:] != base["cells"][1:]
    assert run["labels"][0]["found"]["top1"] == 1.0


def test_a_classifier_tells_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts are prompts throughout, classes come from gradients, and there is nothing to search."""
    model = save_model("bert", tmp_path / "bert")
    rows = classified(0, 60)
    data = write_rows(tmp_path / "classes.jsonl", rows)
    names = sorted({row["label"] for row in rows})
    assert len(names) == CLASSES
    options = ["--task", "sequence-classification", "--codecs", "float32", *FAST]
    labels = f"data.labels=[{', '.join(names)}]"

    found = json.loads(
        audit(capsys, labels, "--model", model, "--data", data, *options, "--format", "json")
    )

    assert list(found["baseline"]) == ["prompts"]
    assert found["labels"][0]["found"]["top1"] == 1.0
    assert found["told"] is None
    assert not any(cell["attack"] == "search" for cell in found["cells"])
    assert any("search: not tried" in note for note in found["notes"])


BAD: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    "no model": ([], 2, ("--model", "--run")),
    "unknown model": (["--model", "./absent"], 8, ("absent", "does not exist")),
    "no run": (["--run", "./absent"], 2, ("absent",)),
    "codec": (["--model", "M", "--codecs", "int5"], 2, ("int5", *CODECS)),
    "codec of ids": (["--model", "M", "--codecs", "int32"], 2, ("int32",)),
    "split": (["--model", "M", "--splits", "5"], 2, ("splits: 5", "1, 2, 3, 4")),
    "split 0": (["--model", "M", "--splits", "0"], 2, ("splits", "at least 1")),
    "share": (["--model", "M", "--share", "1.5"], 2, ("share", "1.5")),
    "override": (["data.colums={}", "--model", "M"], 2, ("colums",)),
    "no classes": (["--model", "M", "--task", "sequence-classification"], 2, ("data.labels",)),
    "public": (["--model", "M", "--public", "absent.jsonl"], 7, ("absent.jsonl",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(llama: Path, pairs: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """One line that names the option, with the exit code of its kind."""
    options, code, words = BAD[case]
    given = [str(llama) if option == "M" else option for option in options]

    line = audit(capsys, *given, "--data", pairs, code=code)

    assert line.startswith("coordinator: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "abc def"}], "too few different rows"),
        ([{"text": "ab"}, {"text": "cd"}], "50 of each are the least"),
        ([{"text": "a", "label": "b"}, {"text": "c", "label": "d"}], "the rows have classes"),
        ([], "data.jsonl"),
    ],
)
def test_bad_data(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], words: str
) -> None:
    """Too little data, data for another task and no data are said with the file's name."""
    data = write_rows(tmp_path / "data.jsonl", rows)

    line = audit(capsys, "--model", llama, "--data", data, code=7)

    assert words in line
    assert "data.jsonl" in line


def test_no_data(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there is named."""
    assert "absent.jsonl" in audit(capsys, "--model", llama, "--data", "absent.jsonl", code=7)
