"""A tracker that fails, hangs or is slow costs the run nothing, and gets no step twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.run import ServeConfig
from coordinator.results.events.event import RunEvent
from coordinator.results.events.reporting import TrackerLeftOut
from coordinator.results.events.rounds import RoundDone
from coordinator.results.events.run import RunFinished, RunStarted, StopAsked
from coordinator.results.run_folder import RunFolder
from coordinator.tracking import feed as feeding
from coordinator.tracking.feed import Feed
from coordinator.tracking.names import Moment, TrackedRun
from coordinator.tracking.numbers import Numbers
from coordinator.tracking.reporting import reporting
from coordinator.tracking.trackers import KINDS, TrackerKind
from edge_sdk.errors import ConfigError

CONFIG = ServeConfig(model="m", rounds=9, steps_per_round=1, report_to=("csv",))


class Bad:
    """A tracker that does what a test wants of it."""

    takes_live = False

    def __init__(self) -> None:
        self.samples: list[Moment] = []
        self.ident: str | None = None
        self.completed: bool | None = None
        self.hangs, self.error = threading.Event(), ""
        self.hangs.set()

    def open(self, about: TrackedRun) -> str:
        """Say what it was called before."""
        self.ident = about.ident
        return "name"

    def take(self, samples: Sequence[Moment]) -> None:
        """Keep them, hang, or fail."""
        self.hangs.wait(60)
        if self.error:
            raise RuntimeError(self.error)
        self.samples += samples

    def close(self, *, completed: bool) -> None:
        """Remember how."""
        self.completed = completed

    def abandon(self) -> None:
        """Come back at last."""
        self.hangs.set()


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def see(self, event: RunEvent) -> None:
        """Keep it."""
        self.events.append(event)

    @property
    def left_out(self) -> list[str]:
        """Why trackers were left out."""
        return [e.reason for e in self.events if isinstance(e, TrackerLeftOut)]


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Bad:
    """A tracker in the place of the table."""
    tracker = Bad()
    monkeypatch.setitem(KINDS, "csv", TrackerKind(lambda: tracker, None, lambda _: None))
    monkeypatch.setattr(feeding, "EVERY_S", 0.01)
    return tracker


def row(number: int) -> RoundDone:
    """A row of metrics after so many rounds."""
    return RoundDone({"round": number, "step": number}, {})


def steps_of(tracker: Bad) -> list[int]:
    """The steps that it was given."""
    return [sample.step for sample in tracker.samples]


def test_a_run_that_goes_on_gives_no_step_twice(bad: Bad, tmp_path: Path) -> None:
    """Steps that were given before a kill are not given again, and the tracker knows its run."""
    for numbers in ([0, 1, 2, 3], [2, 3, 4]):  # killed at 3, resumed from 2
        with reporting(CONFIG, RunFolder(tmp_path), Listener()) as watcher:
            watcher.see(RunStarted("r", numbers[0]))
            for number in numbers:
                watcher.see(row(number))
            watcher.see(RunFinished("completed"))

    assert steps_of(bad) == [0, 1, 2, 3, 4]
    assert bad.ident == "name"
    assert bad.completed


def test_what_a_tracker_raises_is_told_once_and_ends_nothing(bad: Bad, tmp_path: Path) -> None:
    """One line with the reason and no password, in events as well; later numbers go nowhere."""
    bad.error = "no\nnetwork: http://me:sec/r@et@host/x"
    listener, folder = Listener(), RunFolder(tmp_path)

    with reporting(CONFIG, folder, listener) as watcher:
        for number in range(3):
            watcher.see(row(number))
            time.sleep(0.05)

    assert listener.left_out == ["RuntimeError: no network: http://...@host/x"]
    assert [e["reason"] for e in folder.rows("events.jsonl")] == listener.left_out
    assert bad.samples == []


def test_a_tracker_that_hangs_holds_nobody_up(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events are taken at once while it hangs, the end comes in time, and it is abandoned."""
    monkeypatch.setattr("coordinator.tracking.reporting.FINISH_S", 0.1)
    bad.hangs.clear()
    listener = Listener()
    began_s = time.monotonic()

    with reporting(CONFIG, RunFolder(tmp_path), listener) as watcher:
        for number in range(500):
            watcher.see(row(number))
        watcher.see(RunFinished("completed"))

    assert time.monotonic() - began_s < 10
    assert listener.left_out == [
        "it was not done when the run ended; its last numbers may be missing"
    ]
    assert bad.hangs.is_set()


def test_ctrl_c_waits_for_no_tracker(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever hangs, the run is left in what remains of the seconds after Ctrl-C."""
    monkeypatch.setattr("coordinator.tracking.reporting.LEAVE_S", 0.1)
    bad.hangs.clear()
    began_s = time.monotonic()

    with reporting(CONFIG, RunFolder(tmp_path), Listener()) as watcher:
        watcher.see(row(0))
        watcher.see(StopAsked())
        watcher.see(RunFinished("paused"))

    assert time.monotonic() - began_s < 5
    assert not bad.completed


def test_a_queue_has_an_end(bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker for which too much waits is left out, and nothing more is kept for it."""
    monkeypatch.setattr(feeding, "QUEUE", 5)
    bad.hangs.clear()
    listener = Listener()

    with reporting(CONFIG, RunFolder(tmp_path), listener) as watcher:
        for number in range(500):
            watcher.see(row(number))

    assert listener.left_out == ["it does not keep up: 5 events wait for it"]


def test_silence_is_noticed_while_the_run_goes_on(bad: Bad, tmp_path: Path) -> None:
    """A call that does not come back for long is told of before the run ends."""
    now = [0.0]
    bad.hangs.clear()
    about = TrackedRun(name="r", folder=tmp_path, facts={}, config=CONFIG)
    feed = Feed("csv", bad, about, Numbers(CONFIG).of, lambda: now[0])
    feed.offer(row(0))

    deadline_s = time.monotonic() + 30
    while not feed.failure and time.monotonic() < deadline_s:
        now[0] += 40.0
        feed.offer(row(1))
        time.sleep(0.02)

    assert feed.failure == "it has not answered for 150 s"
    bad.abandon()


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is not installed is named with the extra that brings it."""
    from coordinator.tracking import trackers

    def find(name: str) -> Any:
        return None if name == "prometheus_client" else object()

    monkeypatch.setattr(trackers, "find_spec", find)
    config = ServeConfig(model="m", report_to=("csv", "prometheus"))

    with pytest.raises(ConfigError, match=r"report_to: prometheus needs .*edgesplit\[prometheus\]"):
        trackers.require_trackers(config)
