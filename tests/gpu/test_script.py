"""The script for a GPU takes its whole way on the CPU, with tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TESTS

SCRIPT = TESTS.parent / "benchmarks" / "gpu.py"


def test_every_row_is_measured(tmp_path: Path) -> None:
    """Nothing fails and nothing is left out; the results stand in both files."""
    command = [sys.executable, str(SCRIPT), "--scale=tiny", "--device=cpu", f"--out={tmp_path}"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["rows"]
    assert {row["section"] for row in rows} == {"Equality", "Copies", "tiny, 4 blocks", "Board"}
    assert not [row for row in rows if "FAILED" in row.get("found", "")]
    assert not [row for row in rows if "not run" in row.get("found", "")]
    told = (tmp_path / "gpu.md").read_text("utf-8")
    assert all(row["what"] in told for row in rows)
    speeds = [row for row in rows if row["section"] == "tiny, 4 blocks"]
    server = [row for row in speeds if "loss" in row]
    plain, own = (float(row["loss"]) for row in server[:2])
    assert own == pytest.approx(plain, rel=1e-2)  # the same blocks with the same weights


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    """What there is no time for is a row that says so."""
    command = [sys.executable, str(SCRIPT), "--scale=tiny", "--device=cpu", f"--out={tmp_path}"]

    done = subprocess.run([*command, "--seconds=0"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["rows"]
    assert rows
    assert all(row["found"].startswith("not run: ") for row in rows)
