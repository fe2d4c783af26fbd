"""What stands in a run's folder is JSON as every parser reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from coordinator.results.history import RunHistory, overall
from coordinator.results.json_text import json_text
from coordinator.results.metrics import Reporting
from coordinator.results.run_folder import Checkpoint, RunFolder
from coordinator.results.watchers import Watchers

PRODUCT = Path(__file__).parents[3] / "coordinator"
# Who may write into the folder of a run.
WRITERS = ("results", "rounds", "engine", "lab/centralised", "lab/simulation")
# Who of them calls `json.dumps` itself.
ALLOWED = {"results/json_text.py": "the one place"}


def strict(text: str) -> Any:
    """Read JSON as parsers do that know nothing of NaN."""

    def refuse(word: str) -> Any:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(number: float) -> None:
    """At any depth; everything else stays as it is."""
    found = strict(json_text({"a": [1, (number, 2.5)], "b": {"c": number}, "d": "Infinity"}))

    assert found == {"a": [1, [None, 2.5]], "b": {"c": None}, "d": "Infinity"}


def test_finite_rows_have_the_bytes_that_they_always_had() -> None:
    """Keys in order, ASCII, the shortest digits that come back as the same number."""
    row = {"z": 0.1 + 0.2, "a": "\u00e9 \U0001f600", "n": 2**62, "x": [True, None, 1e-320]}

    assert json_text(row) == json.dumps(row, sort_keys=True)
    assert json_text(row, indent=2) == json.dumps(row, sort_keys=True, indent=2)


def test_half_a_surrogate_is_replaced() -> None:
    """As in the name of a file that is no UTF-8: many parsers refuse what Python writes of it."""
    assert strict(json_text({"why": "\udcff.jsonl"})) == {"why": "?.jsonl"}


def test_all_files_of_a_run_stay_readable(tmp_path: Path) -> None:
    """A run that has diverged writes rows and checkpoints, resumes, and is summed up."""
    folder = RunFolder.create(tmp_path, "run")
    row = {"round": 1, "eval": {"loss": math.nan, "targets": 3, "accuracy": 0.0}}
    folder.append("metrics.jsonl", row)
    folder.drop_rows_from("metrics.jsonl", 2)
    progress = {"a": {"loss_sum": math.inf, "num_targets": 3}}
    folder.save_checkpoint(1, Checkpoint({"row": row, "progress": progress}, {}), keep=1)

    for path in (*folder.path.glob("*.jsonl"), *folder.path.glob("*/*.json")):
        assert isinstance(strict(path.read_text()), dict), path
    reporting = Reporting(Watchers(), is_classifier=False)
    reporting.load_progress(folder.load_checkpoint().state["progress"])
    assert math.isnan(reporting.progress()["a"]["loss_sum"])
    history = RunHistory(folder)
    assert math.isnan(history.last_scores()["file"]["loss"])
    found = overall(history.metrics[-1])
    assert found is not None
    assert math.isnan(found.loss)


@pytest.mark.parametrize("left", [b"{", b"\x00" * 40, b"\xff\xfe", b"[1]", b"3", b'{"a": 1}{'])
def test_what_a_power_cut_leaves_of_a_line_is_no_row(tmp_path: Path, left: bytes) -> None:
    """Zeros, garbage and halves are passed over; a row is one object."""
    folder = RunFolder.create(tmp_path, "run")
    folder.append("events.jsonl", {"n": 1})
    with (folder.path / "events.jsonl").open("ab") as file:
        file.write(left)

    folder.append("events.jsonl", {"n": 2})

    assert folder.rows("events.jsonl") == [{"n": 1}, {"n": 2}]


def test_nobody_else_writes_json_into_a_run() -> None:
    """Rows, states and facts become JSON in one place, which knows what JSON does not have."""
    found = {
        str(path.relative_to(PRODUCT))
        for folder in WRITERS
        for path in (PRODUCT / folder).rglob("*.py")
        if "json.dump" in path.read_text(encoding="utf-8")
    }

    assert found == ALLOWED.keys()
