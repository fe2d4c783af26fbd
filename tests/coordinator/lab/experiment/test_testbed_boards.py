"""Boards before a run: all are prepared, or none keeps anything."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import coordinator.lab.experiment.testbed as under_test
from coordinator.lab.experiment.config import BoardConfig, ExperimentConfig
from coordinator.lab.experiment.testbed import run_experiment
from edge_sdk.errors import DeviceError


class FakeHost:
    """A board that says what happens to it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.home, self._said = name, "/", said

    def prepare(self, _key: Path, _wheel: Any, stop: threading.Event) -> None:
        """Fail at once, take a moment, or wait to be stopped: that is in the name."""
        if self.name == "bad":
            raise DeviceError("no such board")
        if self.name == "slow":
            time.sleep(0.2)
        if self.name == "endless" and stop.wait(20.0):
            raise DeviceError("was stopped")
        self._said.append(f"{self.name} has the key")

    def clean(self) -> None:
        """Note it."""
        self._said.append(f"{self.name} is clean")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What boards say; none of them is real."""
    found: list[str] = []
    monkeypatch.setattr(under_test, "make_host", lambda _c, name, *_: FakeHost(name, found))
    return found


def config(*names: str) -> ExperimentConfig:
    """Real boards, so that no limits are needed."""
    boards = {name: BoardConfig(ssh=f"me@{name}") for name in names}
    return ExperimentConfig(model="m", boards=boards)


def test_boards_are_cleaned_when_all_have_what_they_get(tmp_path: Path, said: list[str]) -> None:
    """A board that is still being prepared when another one fails does not keep the key."""
    own = config("bad", "slow")

    with pytest.raises(DeviceError, match="board bad: no such board"):
        run_experiment(own, {"run": own}, tmp_path, print, threading.Event())

    assert said[0] == "slow has the key"
    assert sorted(said[1:]) == ["bad is clean", "slow is clean"]


def test_ctrl_c_ends_the_preparation(tmp_path: Path, said: list[str]) -> None:
    """Nothing is run, everything is removed, and nothing fails."""
    own, stop = config("endless"), threading.Event()
    timer = threading.Timer(0.1, stop.set)
    timer.start()

    ended = run_experiment(own, {"run": own}, tmp_path, print, stop)

    timer.join()
    assert (ended, said) == ({"run": "not run"}, ["endless is clean"])
