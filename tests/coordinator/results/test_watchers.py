"""Whoever looks on sees every event, and the files of a run hold it as they always did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.results.events.devices import DeviceJoined, DeviceLeft, MessageRejected
from coordinator.results.events.event import RunEvent
from coordinator.results.events.plans import ImportanceMeasured
from coordinator.results.events.rounds import (
    DevicesCutOff,
    DevicesMissing,
    RoundAbandoned,
    RoundDone,
    RoundStarted,
    StepSkipped,
    Telemetry,
    Waiting,
    WaitingOver,
    WorkDropped,
)
from coordinator.results.events.run import Exported, RunFinished, RunStarted
from coordinator.results.run_folder import RunFolder
from coordinator.results.standing.observed import DeviceOffer, ModelKnown
from coordinator.results.watchers import RunFiles, Watchers
from profiler.profile import DeviceProfile

LINES: dict[str, RunEvent] = {
    '{"event": "run.started", "run": "r", "step": 20}': RunStarted("r", 20),
    '{"event": "run.ended", "outcome": "paused"}': RunFinished("paused"),
    '{"difference": 1e-07, "event": "model.exported"}': Exported("model", 1e-7, Path("x")),
    '{"attempt": 2, "devices": ["a", "b"], "event": "round.started", "round": 1}': (
        RoundStarted(1, 2, ["a", "b"], {"a": {"energy": 1.0}})
    ),
    '{"event": "step.skipped", "reason": "gradient not finite", "step": 3}': StepSkipped(3),
    '{"device": "a", "event": "device.joined", "samples": 9, "split": 2}': DeviceJoined("a", 2, 9),
    (
        '{"cut": 2, "device": "a", "event": "device.joined", "left_out": 1, "samples": 9, '
        '"split": 2}'
    ): DeviceJoined("a", 2, 9, 1, 2),
    '{"blocks": 12, "event": "model"}': ModelKnown(12),
    '{"board": "Pi 5", "device": "a", "event": "device.offers", "up_bytes_per_s": 2.0}': (
        DeviceOffer("a", "has told it", DeviceProfile(board="Pi 5", up_bytes_per_s=2.0))
    ),
    '{"device": "a", "event": "device.left", "reason": "gone"}': DeviceLeft("a", "gone"),
    '{"device": "a", "error": "bad", "event": "message.rejected"}': MessageRejected("a", "bad"),
    (
        '{"devices": ["a"], "event": "waiting", "others_s": 0.8, "seconds": 15.0, '
        '"what": "step 12"}'
    ): Waiting("step 12", ["a"], 15.0, 0.8),
    '{"device": "a", "event": "waiting.over", "seconds": 31.5, "what": "step 12"}': (
        WaitingOver("step 12", "a", 31.5)
    ),
    (
        '{"event": "devices.missing", "least": 3, "ready": ["a", "c"], "round": 2, '
        '"seconds": 40.0, "why": {"b": "left 40 s ago: silent"}}'
    ): DevicesMissing(2, ["a", "c"], 3, {"b": "left 40 s ago: silent"}, 40.0),
    '{"deadline_s": 60.0, "devices": ["b"], "event": "round.deadline", "round": 2}': (
        DevicesCutOff(2, ["b"], 60.0)
    ),
    '{"device": "b", "event": "work.dropped", "round": 2}': WorkDropped(2, "b"),
}


@pytest.mark.parametrize(("line", "event"), LINES.items(), ids=lambda value: type(value).__name__)
def test_an_event_is_a_line_with_the_time(tmp_path: Path, line: str, event: RunEvent) -> None:
    """events.jsonl holds the event's name, its details and a clock time."""
    folder = RunFolder.create(tmp_path, "run")

    RunFiles(folder).see(event)

    (row,) = folder.rows("events.jsonl")
    assert row.pop("time")
    assert json.dumps(row, sort_keys=True) == line


def test_rows_go_to_their_files(tmp_path: Path) -> None:
    """Metrics and telemetry have files of their own; what only people read is in none."""
    folder = RunFolder.create(tmp_path, "run")
    files = RunFiles(folder)

    files.see(RoundAbandoned(1))
    assert not list(folder.path.iterdir())
    files.see(ImportanceMeasured(1, {"w": 0.123456}))
    files.see(RoundDone({"round": 1}, {"a": {"energy": 2.0}}))
    files.see(Telemetry(0, 1.23456, {"a": {"tokens": 3}}))

    assert folder.rows("importance.jsonl") == [{"round": 1, "importance": {"w": 0.1235}}]
    assert folder.rows("metrics.jsonl") == [{"round": 1}]
    assert folder.rows("telemetry.jsonl") == [
        {"round": 0, "seconds": 1.235, "devices": {"a": {"tokens": 3}}}
    ]


class Witness:
    """Keeps what it sees in a list that others write to, too."""

    def __init__(self, name: str, seen: list[str], *, fails: bool = False) -> None:
        self._name, self._seen, self._fails = name, seen, fails

    def see(self, event: RunEvent) -> None:
        """Keep it, and fail after that."""
        self._seen.append(f"{self._name} {type(event).__name__}")
        if self._fails:
            raise OSError(self._name)


def test_everybody_sees_an_event_before_the_next_one() -> None:
    """Watchers are told in order; nobody at all is a watcher, too."""
    seen: list[str] = []
    both = Watchers([Witness("one", seen), Watchers(), Witness("two", seen)])

    both.see(RunStarted("r", 0))
    both.see(RunFinished("completed"))

    assert seen == ["one RunStarted", "two RunStarted", "one RunFinished", "two RunFinished"]


def test_what_a_watcher_raises_is_the_run_s_error() -> None:
    """Nothing is hidden: who stands before it has seen the event, who stands behind it has not."""
    seen: list[str] = []
    watchers = Watchers(
        [Witness("one", seen), Witness("two", seen, fails=True), Witness("3", seen)]
    )

    with pytest.raises(OSError, match="two"):
        watchers.see(RunStarted("r", 0))

    assert seen == ["one RunStarted", "two RunStarted"]


TEXTS: dict[str, RunEvent] = {
    "step 12: waiting 15 s for kitchen (others took 0.8 s)": (
        Waiting("step 12", ["kitchen"], 15.2, 0.81)
    ),
    "step 12: waiting 30 s for hall, kitchen": Waiting("step 12", ["hall", "kitchen"], 30.0, None),
    "step 12: kitchen was waited for, 47 s in all": WaitingOver("step 12", "kitchen", 47.0),
    "round 3 waits for 1 more device: 2 of 3 are here; kitchen left 40 s ago: silent for 120 s": (
        DevicesMissing(2, ["a", "c"], 3, {"kitchen": "left 40 s ago: silent for 120 s"}, 40.0)
    ),
    "round 1 waits for 3 more devices: 0 of 3 are here": DevicesMissing(0, [], 3, {}, 15.0),
    "round 3: over its deadline of 60 s; it goes on without b, back in the next one": (
        DevicesCutOff(2, ["b"], 60.0)
    ),
    "b: its adapters of round 3 came too late and are not used": WorkDropped(2, "b"),
}


@pytest.mark.parametrize(("text", "event"), TEXTS.items(), ids=lambda value: type(value).__name__)
def test_what_is_waited_for_is_a_line(text: str, event: RunEvent) -> None:
    """A person reads what is waited for, for how long, and what comes of it."""
    assert event.text == text
