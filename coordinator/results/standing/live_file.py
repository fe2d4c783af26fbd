"""A small file in which a run that goes on says where it stands, for `status` and `health`.

Nothing depends on it: what a run is resumed from, and its history, stand in the other files.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.results.events.devices import DeviceEvent
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import (
    RoundDone,
    RoundStarted,
    RunRewound,
    StepDone,
    Telemetry,
)
from coordinator.results.events.run import FolderKnown, Listening, RunFinished
from coordinator.results.json_text import json_text
from coordinator.results.run_folder import CLOCK, LIVE
from coordinator.results.standing.observed import Computed
from coordinator.results.standing.pulse import FINISHING, LISTENING, STARTING
from coordinator.results.standing.timeline import Timeline
from edge_sdk.errors import StorageError
from edge_sdk.files import atomic_write

log = logging.getLogger(__name__)

# Seconds between two writes for steps alone; everything else is written as it happens.
EVERY_S = 1.0
# Of more devices than a few the file is large. To write it takes one part of so many of the time,
# and is never put off for longer than that.
FEW, WRITE_PART, MOST_PAUSE_S = 64, 100, 10.0
# Steps over which a rate is taken: what is done now, not what was done an hour ago.
RATE_STEPS = 20


@dataclass
class _Pace:
    """When the last things ended, in seconds, and how much each was."""

    ends: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RATE_STEPS))

    def per_second(self) -> float | None:
        """Return how much was done in a second; None where that is not known yet."""
        if len(self.ends) < 2:
            return None
        amount = sum(each for _, each in list(self.ends)[1:])
        return amount / max(1e-9, self.ends[-1][0] - self.ends[0][0])


class LiveFile:
    """Writes where the run stands: a watcher. A file that cannot be written ends nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._path: Path | None = None
        self._facts: dict[str, Any] = {"phase": STARTING, "round": None, "step": None}
        self._facts["steps_per_s"] = None
        self._devices: dict[str, dict[str, Any]] = {}
        self._tokens: dict[str, _Pace] = {}
        self._links: dict[str, tuple[_Pace, _Pace]] = {}
        self._timeline = Timeline()
        self._steps = _Pace()
        self._written_s = self._turned_s = self._free_s = float("-inf")
        """When it was last written, last touched, and when it may be written again for a device."""
        self._is_behind = False
        """Whether something that is known has not been written."""

    def see(self, event: RunEvent) -> None:
        """Take notice of *event*, and write where that is due."""
        now_s = self._clock()
        match event:
            case FolderKnown(folder):
                self._path = folder / LIVE
                if isinstance(event, Listening):
                    self._facts |= {"phase": LISTENING, "address": event.address}
            case Computed():
                self._timeline.computed(event, now_s)
                return
            case RunFinished():
                self._facts["phase"] = FINISHING
            case RoundStarted(round_, boards=boards, waiting=waiting):
                for device in waiting:
                    self._waits(device, f"waits: not in round {event.nth}")
                self._facts |= {"round": round_, "round_since": time.strftime(CLOCK)}
                self._steps.ends.clear()
                self._take_boards(boards)
            case RunRewound():
                self._facts["step"] = None
                self._steps.ends.clear()
            case Telemetry(devices=devices):
                self._take_costs(devices)
            case RoundDone(boards=boards):
                self._take_boards(boards)
            case StepDone():
                self._take_step(event, now_s)
                self._is_behind = True
                if now_s < max(self._free_s, self._written_s + EVERY_S):
                    return
            case DeviceEvent():
                self._waits(event.device, event.doing)
                self._is_behind = True
                if now_s < self._free_s:
                    return
        self._write(now_s)

    def _waits(self, device: str, doing: str) -> None:
        """Note that a device does something else than to train."""
        self._of(device).update({"doing": doing, "since": time.strftime(CLOCK)})
        self._tokens.pop(device, None)
        self._links.pop(device, None)

    def turn(self) -> None:
        """Let the file's time show that the event loop turns; for `coordinator health`."""
        now_s = self._clock()
        if self._path is None or now_s - self._turned_s < EVERY_S:
            return
        self._turned_s = now_s
        if self._is_behind and now_s >= self._free_s:
            self._write(now_s)
        try:
            os.utime(self._path)
        except FileNotFoundError:
            self._write(now_s)
        except OSError as error:
            log.info("live.untouched reason=%s", error.strerror)

    def _of(self, device: str) -> dict[str, Any]:
        return self._devices.setdefault(device, {"doing": "", "since": time.strftime(CLOCK)})

    def _take_boards(self, boards: Mapping[str, Mapping[str, Any]]) -> None:
        for device, board in boards.items():
            self._of(device)["board"] = dict(board)

    def _take_costs(self, devices: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what devices have moved by the end of a round: more than at its last step."""
        for device, cost in devices.items():
            known = {key: cost[key] for key in ("bytes_up", "bytes_down") if key in cost}
            self._of(device).update(known)

    def _take_step(self, event: StepDone, now_s: float) -> None:
        report, mine = event.report, self._of(event.device)
        done, pace = report.stamp.step + 1, self._tokens.setdefault(event.device, _Pace())
        pace.ends.append((now_s, report.num_tokens))
        mine |= {"doing": "training", "step": done, "loss": report.loss}
        mine |= {"tokens_per_s": pace.per_second(), "peak_bytes": report.peak_bytes}
        mine |= {"compute_s": report.compute_s, "wait_s": report.wait_s}
        if event.traffic is not None:
            self._take_traffic(event.device, event.traffic, now_s)
        self._timeline.step(event, now_s)
        if event.board:
            mine["board"] = dict(event.board)
        before = self._facts["step"]
        if before is None or done != before:
            self._steps.ends.append((now_s, 1 if before is None else max(0, done - before)))
            self._facts |= {"step": max(done, before or 0)}
            self._facts["steps_per_s"] = self._steps.per_second()
        self._facts["end_step"] = event.end_step

    def _take_traffic(self, device: str, traffic: tuple[int, int], now_s: float) -> None:
        """Note what a device has moved in all, and how fast it does so now."""
        mine, links = self._of(device), self._links.setdefault(device, (_Pace(), _Pace()))
        for way, total, pace in zip(("up", "down"), traffic, links, strict=True):
            pace.ends.append((now_s, max(0, total - mine.get(f"bytes_{way}", 0))))
            mine |= {f"bytes_{way}": total, f"{way}_bytes_per_s": pace.per_second()}

    def _write(self, now_s: float) -> None:
        if self._path is None:
            return
        self._written_s = now_s
        facts = {"time": time.strftime(CLOCK), **self._facts, "devices": self._devices}
        facts["timeline"] = {"now_s": round(now_s, 3), **self._timeline.facts()}
        try:
            atomic_write(self._path, json_text(facts), sync=False, what="where the run stands")
        except StorageError as error:
            log.info("live.unwritten reason=%s", error)
        self._is_behind = False
        if len(self._devices) > FEW:
            self._free_s = now_s + min(MOST_PAUSE_S, WRITE_PART * (self._clock() - now_s))
