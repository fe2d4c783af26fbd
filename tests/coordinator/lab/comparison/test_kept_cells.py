"""What is kept of a comparison: found again if it is the same run, and told apart if it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.lab.comparison.kept_cells import KeptCells, differences
from tests.coordinator.lab.comparison.made_cells import make_cell


def test_a_run_is_found_by_method_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by the version that made it: what another one has kept is counted and left alone."""
    kept, cell = KeptCells(tmp_path), make_cell([3.0, 1.0])
    kept.append(cell, "abc", 12.3456)

    assert kept.find("m", "abc") == (cell, 12.346)
    assert kept.find("m", "abd") is None
    assert kept.find("n", "abc") is None
    assert kept.num_old() == 0
    (line,) = (tmp_path / "cells.jsonl").read_text().splitlines()
    old = {k: v for k, v in json.loads(line).items() if k != "format"}
    (tmp_path / "cells.jsonl").write_text(json.dumps(old) + "\n")
    assert (kept.find("m", "abc"), kept.num_old()) == (None, 1)


def test_differences_are_named_by_their_keys() -> None:
    """With both values, also where a key is new or gone."""
    before = {"rounds": 2, "compare": {"seeds": [0], "labels": None}, "gone": {"a": 1}}
    after = {"rounds": 3, "compare": {"seeds": [0], "labels": "server"}, "new": True}

    assert differences(before, after) == [
        "rounds: 2 -> 3",
        "compare.labels: None -> server",
        "gone.a: 1 -> None",
        "new: None -> True",
    ]
    assert differences(before, before) == []
