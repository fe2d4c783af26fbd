"""Where a run stands is read from its folder, in words and numbers that are true at that moment."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path

import pytest

from coordinator.config.run import ServeConfig
from coordinator.results.events.devices import DeviceJoined, DeviceLeft, DeviceStatus
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import (
    DevicesMissing,
    RoundDone,
    RoundStarted,
    StepDone,
    Telemetry,
    Waiting,
)
from coordinator.results.events.run import Listening, RunFinished, RunStarted
from coordinator.results.lifecycle import COMPLETED, PAUSED, new_folder
from coordinator.results.run_folder import Checkpoint, RunFolder
from coordinator.results.run_lock import is_held, locked
from coordinator.results.standing.live_file import LiveFile
from coordinator.results.standing.standing import Standing, stand
from coordinator.results.watchers import RunFiles, Watchers
from edge_sdk.protocol.messages import Stamp, StepReport

JOINED = DeviceJoined("a", 2, 8)
STARTED = RunStarted("r", 0)
ROUND = RoundStarted(0, 1, ["a"], {})


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    """Four rounds of ten steps."""
    return ServeConfig(model="m", runs=tmp_path, name="run", rounds=4, steps_per_round=10)


@pytest.fixture
def folder(config: ServeConfig) -> RunFolder:
    """The folder of a new run."""
    with new_folder(config) as folder:
        return folder


def see(folder: RunFolder, *events: RunEvent) -> None:
    """Let a run's files see *events*, as a coordinator does, one every 1.5 s."""
    clock = itertools.count(0.0, 1.5)
    watchers = Watchers([RunFiles(folder), LiveFile(lambda: next(clock))])
    for event in (Listening(folder.path, "tcp://*:1"), *events):
        watchers.see(event)


def standing(folder: RunFolder, config: ServeConfig) -> Standing:
    """Where the run stands now."""
    return stand(folder, config, datetime.now().astimezone())


def done(step: int, traffic: tuple[int, int] = (0, 0)) -> StepDone:
    """The end of a step of device a."""
    report = StepReport(
        stamp=Stamp(step=step),
        loss=1.25,
        num_targets=5,
        num_sequences=1,
        num_tokens=30,
        compute_s=0.1,
        wait_s=0.1,
        peak_bytes=3_000_000,
    )
    return StepDone("a", report, 20, traffic, {"temperature": 61.5})


GOING_ON: dict[str, list[RunEvent]] = {
    "starting": [],
    "waiting for devices": [STARTED, DeviceStatus("a", "fetching its blocks")],
    "waiting for 1 more device: 1 of 2 are here": [STARTED, DevicesMissing(0, ["a"], 2, {}, 15.0)],
    "waiting for kitchen": [STARTED, JOINED, ROUND, Waiting("step 1", ["kitchen"], 15.0, None)],
    "running": [STARTED, JOINED, ROUND],
    "complete; its result is being written": [STARTED, JOINED, ROUND, RunFinished(COMPLETED)],
}


@pytest.mark.parametrize("words", GOING_ON)
def test_a_run_that_is_held_says_what_it_does(
    words: str, folder: RunFolder, config: ServeConfig
) -> None:
    """From its start to its end, for as long as a coordinator lives."""
    with locked(folder.path):
        if GOING_ON[words]:
            see(folder, *GOING_ON[words])
        found = standing(folder, config)

    assert (found.state, found.is_running) == (words, True)
    assert not is_held(folder.path)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ([RunFinished(PAUSED)], "paused at step 26 of 40, resumable"),
        ([], "ended without a word at step 26 of 40, resumable"),
        ([RunFinished(COMPLETED)], "complete"),
    ],
)
def test_a_run_that_nobody_holds_says_how_it_ended(
    last: list[RunEvent], words: str, folder: RunFolder, config: ServeConfig
) -> None:
    """Paused in order, killed, or complete."""
    see(folder, STARTED, JOINED, ROUND)
    folder.save_checkpoint(26, Checkpoint({}, {"engine": {}, "ledger": {}}), 1)
    see(folder, *last)

    found = standing(folder, config)

    assert (found.state, found.is_running) == (words, False)
    assert (found.run_left_s, found.round_left_s) == (None, None)


def test_a_run_without_a_checkpoint_says_what_resume_does(
    folder: RunFolder, config: ServeConfig
) -> None:
    """It begins anew."""
    see(folder, STARTED)

    assert standing(folder, config).state.startswith("ended before its first checkpoint")


def test_a_running_run_has_numbers(folder: RunFolder, config: ServeConfig) -> None:
    """Step, pace, bytes, memory and temperature of the steps so far, and when it will end."""
    telemetry = {"a": {"tokens": 300, "peak_bytes": 5, "bytes_up": 100, "bytes_down": 200}}
    first = [STARTED, JOINED, ROUND, Telemetry(0, 20.0, telemetry), RoundDone({"round": 1}, {})]
    second = [RoundStarted(1, 1, ["a"], {}), *map(done, range(10, 14)), done(14, (150, 260))]
    with locked(folder.path):
        see(folder, *first, *second)
        found = standing(folder, config)

    [device] = found.devices
    assert (found.round, found.step, found.total_steps) == (2, 15, 40)
    assert (device.step, device.split, device.doing) == (15, 2, "training")
    assert device.tokens_per_s == pytest.approx(20.0)
    assert (device.bytes_up, device.bytes_down, device.peak_bytes) == (150, 260, 3_000_000)
    assert device.temperature == 61.5
    assert found.round_left_s == pytest.approx(5 * 1.5)
    assert found.run_left_s == pytest.approx(5 * 1.5 + 2 * 20.0)


def test_bytes_of_a_round_that_is_over_count_once(folder: RunFolder, config: ServeConfig) -> None:
    """Its last step knew a little less than the round's row, which is no new session."""
    telemetry = {"a": {"tokens": 300, "peak_bytes": 5, "bytes_up": 160, "bytes_down": 261}}
    rows = [Telemetry(0, 20.0, telemetry), RoundDone({"round": 1}, {})]
    see(folder, STARTED, JOINED, ROUND, done(9, (150, 260)), *rows)

    [device] = standing(folder, config).devices

    assert (device.bytes_up, device.bytes_down) == (160, 261)


def test_the_last_trouble_with_a_device_is_kept(folder: RunFolder, config: ServeConfig) -> None:
    """An error or a delay, also of a device that was never ready; that it was stopped is none."""
    late = DeviceStatus("c", "silent for 9 s", is_delay=True)
    see(
        folder, STARTED, DeviceLeft("b", "DataError: raised in x"), DeviceLeft("a", "stopped"), late
    )

    troubles = {one.name: one.trouble for one in standing(folder, config).devices}

    assert troubles == {"a": "", "b": "DataError: raised in x", "c": "silent for 9 s"}


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    """The run's own files are another matter; this one is only looked at."""
    live = LiveFile()
    (tmp_path / "live.json").mkdir()

    live.see(Listening(tmp_path, "tcp://*:1"))
    live.see(JOINED)

    assert (tmp_path / "live.json").is_dir()
