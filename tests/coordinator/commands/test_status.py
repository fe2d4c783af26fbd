"""`coordinator status` says where a run stands, and whom it waits for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.config.run import ServeConfig
from coordinator.results.events import (
    DeviceJoined,
    DevicesMissing,
    RoundDone,
    RoundStarted,
    Waiting,
)
from coordinator.results.lifecycle import new_folder
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import RunFiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that waits for a device in a step."""
    config = ServeConfig(model="m", runs=tmp_path, name="run", rounds=4)
    with new_folder(config) as folder:
        files = RunFiles(folder)
        for event in (
            DevicesMissing(0, ["a"], 2, {"b": "has been on its way for 15 s"}, 15.0),
            DeviceJoined("b", 1, 8),
            RoundStarted(0, 1, ["a", "b"], {}),
            Waiting("step 1", ["b"], 15.0, 0.8),
        ):
            files.see(event)
        return folder.path


def test_who_is_waited_for_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Since when, and in which part of the run; what was waited for before is not."""
    assert main(["status", str(folder)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "waiting for" in line]
    assert line.startswith("waiting for b since 20")
    assert line.endswith(": step 1")

    assert main(["status", str(folder), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["waiting"]["b"]["what"] == "step 1"
    assert found["missing"] is None


def test_how_far_devices_lag_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a device is given less than all, the share that it lacks is shown by name."""
    files = RunFiles(RunFolder(folder))
    files.see(RoundDone({"round": 1, "step": 3, "lag_by_device": {"a": 0.0573, "b": 0.1}}, {}))

    assert main(["status", str(folder)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert "devices lack of what the run has learned: a 5.7%, b 10.0%" in lines
