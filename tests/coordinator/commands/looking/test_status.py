"""`coordinator status` says where a run stands, and whom it waits for."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.config.run import ServeConfig
from coordinator.results.events.devices import DeviceJoined
from coordinator.results.events.rounds import DevicesMissing, RoundDone, RoundStarted, Waiting
from coordinator.results.lifecycle import new_folder
from coordinator.results.run_folder import RunFolder
from coordinator.results.run_lock import locked
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


def test_without_a_folder_runs_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """State, round, devices, loss and age of each, for a person and for a program."""
    assert main(["status", "--runs", str(folder.parent)]) == 0
    heading, line = capsys.readouterr().out.splitlines()[:2]
    assert heading.split() == ["run", "state", "round", "devices", "loss", "age"]
    assert line.startswith("run  ended before its first checkpoint")

    assert main(["status", str(folder.parent), "--format", "json"]) == 0
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert (run["run"], run["round"], run["rounds"]) == ("run", 1, 4)


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is not there is an error that says what to name."""
    assert main(["status", "--runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out

    assert main(["status", "--runs", str(tmp_path / "absent")]) == 2
    assert "is no folder of runs" in capsys.readouterr().err


def test_watching_ends_with_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows the run again and again while a coordinator holds it, and once more at its end."""
    with locked(folder):
        watching = threading.Thread(target=main, args=(["status", str(folder), "--watch", "0.1"],))
        watching.start()
        watching.join(1.5)
        assert watching.is_alive()
    watching.join(60.0)

    assert not watching.is_alive()
    out = capsys.readouterr().out
    assert "run run: waiting for b" in out
    assert "run run: ended before its first checkpoint" in out
