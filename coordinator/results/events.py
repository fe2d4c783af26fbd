"""What can happen in a run, as values.

Watchers get them (`watchers.py`) and can change nothing. A new kind of event is a class here; where
a person should read of it, `text` is the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coordinator.planning.plan_set import PlanSet
from edge_sdk.protocol.messages import StepReport


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened in a run."""

    @property
    def text(self) -> str:
        """What a person reads of it, in lines; empty where a watcher finds its own words."""
        return ""


class Watcher(Protocol):
    """Somebody who looks on."""

    def see(self, event: RunEvent) -> None:
        """Take notice of *event*; called in the run's own thread, in the order of events."""


# ---- the run ----


@dataclass(frozen=True, slots=True)
class Listening(RunEvent):
    """Devices can connect."""

    folder: Path
    address: str

    @property
    def text(self) -> str:
        """The run's folder and the address that devices dial."""
        return f"run {self.folder}: listening at {self.address}"


@dataclass(frozen=True, slots=True)
class RunStarted(RunEvent):
    """A run begins, or goes on after a stop."""

    run: str
    step: int
    """First step that is to be done."""


@dataclass(frozen=True, slots=True)
class RunFinished(RunEvent):
    """The event loop has ended."""

    outcome: str


@dataclass(frozen=True, slots=True)
class RunPaused(RunEvent):
    """A stopped run is saved, and can go on."""

    folder: Path

    @property
    def text(self) -> str:
        """The command that goes on with it."""
        return f"stopped; go on with: coordinator resume {self.folder}"


@dataclass(frozen=True, slots=True)
class StopAsked(RunEvent):
    """Somebody wants the run to stop."""

    @property
    def text(self) -> str:
        """What happens next: a step may take long, or wait for a frozen device."""
        return "stopping after this step; a second Ctrl-C leaves at once"


@dataclass(frozen=True, slots=True)
class StopBegun(RunEvent):
    """Devices have been asked to save their state."""

    step: int

    @property
    def text(self) -> str:
        """Where the run stops."""
        return f"stopping at step {self.step}; devices save their state"


@dataclass(frozen=True, slots=True)
class Exported(RunEvent):
    """The result is written, read back and compared."""

    what: str
    """`adapter` or `model`."""
    difference: float
    """Largest relative difference of a logit."""
    path: Path | None = None
    """Folder of the result; None where a person is told of it in other words."""

    @property
    def text(self) -> str:
        """Where the result is."""
        checked = f"(read back, logits differ by {self.difference:.0e} at most)"
        return "" if self.path is None else f"{self.what}: {self.path} {checked}"


# ---- rounds and steps ----


@dataclass(frozen=True, slots=True)
class RoundStarted(RunEvent):
    """The devices of a round train from now on."""

    round: int
    attempt: int
    devices: Sequence[str]
    boards: Mapping[str, Mapping[str, Any]]
    """What each board said of itself with its last sign of life, by device."""


@dataclass(frozen=True, slots=True)
class RoundAbandoned(RunEvent):
    """A round was given up."""

    round: int

    @property
    def text(self) -> str:
        """Why, and what happens next."""
        return f"round {self.round} starts again: too few devices are left"


@dataclass(frozen=True, slots=True)
class WaitEnded(RunEvent):
    """Devices that the round waited for did not come in time."""

    devices: Sequence[str]

    @property
    def text(self) -> str:
        """Who is missing."""
        return f"going on without {', '.join(self.devices)}: not back yet"


@dataclass(frozen=True, slots=True)
class StepDone(RunEvent):
    """A device has finished a step."""

    device: str
    report: StepReport
    end_step: int
    """First step after the round."""
    traffic: tuple[int, int] | None
    """Bytes up and down in the device's session; None without a connection."""


@dataclass(frozen=True, slots=True)
class StepSkipped(RunEvent):
    """A gradient was not finite: the coordinator's own adapters did not move in this step."""

    step: int

    @property
    def text(self) -> str:
        """Which step."""
        return f"step {self.step}: a gradient was not finite; the coordinator's adapters wait"


@dataclass(frozen=True, slots=True)
class Telemetry(RunEvent):
    """What a round cost."""

    round: int
    seconds: float
    """Since the round's start."""
    devices: Mapping[str, Mapping[str, Any]]
    """By device: tokens, seconds, bytes, memory, and what its board said."""


@dataclass(frozen=True, slots=True)
class ImportanceMeasured(RunEvent):
    """The planner knows how much each weight matters after so many rounds."""

    round: int
    importance: Mapping[str, float]
    """Smoothed global importance by weight."""


@dataclass(frozen=True, slots=True)
class RoundDone(RunEvent):
    """A row of metrics is complete; row 0 is what was there before training."""

    row: Mapping[str, Any]
    boards: Mapping[str, Mapping[str, Any]]
    """What each board said of itself with its last sign of life, by device."""


@dataclass(frozen=True, slots=True)
class PlanMade(RunEvent):
    """Devices and coordinator are to run other plans."""

    round: int
    """First round of these plans."""
    plans: PlanSet
    reasons: Sequence[str]
    importance: Mapping[str, float]
    """What the ranks were chosen by; empty where nothing is measured."""

    @property
    def text(self) -> str:
        """A line for each reason."""
        return "\n".join(f"plans from round {self.round} on: {why}" for why in self.reasons)


# ---- devices ----


@dataclass(frozen=True, slots=True)
class MessageRejected(RunEvent):
    """A packet of a device could not be read."""

    device: str
    error: str

    @property
    def text(self) -> str:
        """Whose, and why."""
        return f"{self.device}: rejected: {self.error}"


@dataclass(frozen=True, slots=True)
class DeviceEvent(RunEvent):
    """A device joined, left, or does something else than before."""

    device: str

    @property
    def doing(self) -> str:
        """What it does now, in a few words."""
        return ""

    @property
    def text(self) -> str:
        """Who does what."""
        return f"{self.device}: {self.doing}"


@dataclass(frozen=True, slots=True)
class DeviceStatus(DeviceEvent):
    """A device is on its way to a round."""

    status: str

    @property
    def doing(self) -> str:
        """As the field says."""
        return self.status


@dataclass(frozen=True, slots=True)
class DeviceJoined(DeviceEvent):
    """A device is ready to train."""

    split: int
    """Blocks that it holds."""
    samples: int
    """Training samples that it has."""

    @property
    def doing(self) -> str:
        """It waits for a round."""
        return "ready"


@dataclass(frozen=True, slots=True)
class DeviceLeft(DeviceEvent):
    """A device that was ready to train is gone."""

    reason: str

    @property
    def doing(self) -> str:
        """Why it is gone."""
        return f"left: {self.reason}"
