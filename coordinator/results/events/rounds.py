"""Rounds begin, wait, end and are given up; steps in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.results.events.event import MOST_NAMED, RoundEvent, RunEvent, some_names
from edge_sdk.protocol.messages import StepReport


@dataclass(frozen=True, slots=True)
class RoundStarted(RoundEvent):
    """The devices of a round train from now on."""

    attempt: int
    devices: Sequence[str]
    boards: Mapping[str, Mapping[str, Any]]
    """What each board said of itself with its last sign of life, by device."""
    waiting: Sequence[str] = ()
    """Devices that are ready too, and were not drawn."""

    @property
    def text(self) -> str:
        """Who was drawn, where not all are in."""
        if not self.waiting:
            return ""
        count = len(self.devices)
        drawn = f"round {self.nth}: {count} of {count + len(self.waiting)} devices"
        return f"{drawn}: {some_names(self.devices)}"


@dataclass(frozen=True, slots=True)
class RoundAbandoned(RoundEvent):
    """A round was given up."""

    LINE = "round {0.nth} starts again: too few devices are left"


@dataclass(frozen=True, slots=True)
class WaitEnded(RunEvent):
    """Devices that the round waited for did not come in time."""

    devices: Sequence[str]

    @property
    def text(self) -> str:
        """Who is missing."""
        return f"going on without {some_names(self.devices)}: not back yet"


@dataclass(frozen=True, slots=True)
class Waiting(RunEvent):
    """Devices keep the run waiting."""

    what: str
    """Part of the run that cannot go on."""
    devices: Sequence[str]
    seconds: float
    """Since anything came from them."""
    others_s: float | None
    """What others took, in seconds; None where nobody has done it yet."""

    @property
    def text(self) -> str:
        """Who is waited for, and how long that usually takes."""
        took = "" if self.others_s is None else f" (others took {self.others_s:.1f} s)"
        return f"{self.what}: waiting {self.seconds:.0f} s for {some_names(self.devices)}{took}"


@dataclass(frozen=True, slots=True)
class WaitingOver(RunEvent):
    """A device that kept the run waiting has done its part."""

    LINE = "{0.what}: {0.device} was waited for, {0.seconds:.0f} s in all"

    what: str
    device: str
    seconds: float


@dataclass(frozen=True, slots=True)
class DevicesMissing(RoundEvent):
    """A round cannot begin: too few devices are ready."""

    ready: Sequence[str]
    least: int
    """Devices that the round needs."""
    why: Mapping[str, str]
    """What is known of those that are not ready, by device."""
    seconds: float
    """Since that has been so."""

    @property
    def text(self) -> str:
        """How many are missing, and what has become of them."""
        missing = self.least - len(self.ready)
        noun = "device" if missing == 1 else "devices"
        is_here = "is here" if len(self.ready) == 1 else "are here"
        here = f"{len(self.ready)} of {self.least} {is_here}"
        known = [f"{device} {why}" for device, why in sorted(self.why.items())]
        if (more := len(known) - MOST_NAMED) > 0:
            known[MOST_NAMED:] = [f"and {more:,} more"]
        return "; ".join([f"round {self.nth} waits for {missing} more {noun}: {here}", *known])


@dataclass(frozen=True, slots=True)
class DevicesCutOff(RoundEvent):
    """A round goes on without members that are too slow for it."""

    devices: Sequence[str]
    deadline_s: float

    @property
    def text(self) -> str:
        """Who is too late, and what comes of it."""
        names = some_names(self.devices)
        late = f"round {self.nth}: over its deadline of {self.deadline_s:g} s"
        return f"{late}; it goes on without {names}, back in the next one"


@dataclass(frozen=True, slots=True)
class WorkDropped(RoundEvent):
    """What a device has learned in a round came too late for it."""

    LINE = "{0.device}: its adapters of round {0.nth} came too late and are not used"

    device: str


@dataclass(frozen=True, slots=True)
class UploadRefused(RoundEvent):
    """What a device has learned in a round is left out of it; the round goes on."""

    LINE = "{0.device}: its adapters of round {0.nth} are left out: {0.reason}"

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunRewound(RoundEvent):
    """A round led to nothing good, and no device is to blame: the run goes back."""

    LINE = "round {0.nth}: back to the last good state: {0.reason}"

    reason: str


@dataclass(frozen=True, slots=True)
class StopForced(RunEvent):
    """The run stops although a step could not be ended."""

    devices: Sequence[str]
    """Who was waited for."""

    @property
    def text(self) -> str:
        """What was waited for, and what counts now."""
        whom = f" for {some_names(self.devices)}" if self.devices else ""
        return f"stopping in mid-step, which waits{whom}; the last checkpoint counts"


@dataclass(frozen=True, slots=True)
class StepDone(RunEvent):
    """A device has finished a step."""

    device: str
    report: StepReport
    end_step: int
    """First step after the round."""
    traffic: tuple[int, int] | None
    """Bytes up and down of the device in the whole run; None without a connection."""
    board: Mapping[str, Any] = field(default_factory=dict)
    """What its board said of itself with its last sign of life."""


@dataclass(frozen=True, slots=True)
class StepSkipped(RunEvent):
    """A gradient was not finite: the coordinator's own adapters did not move in this step."""

    LINE = "step {0.step}: a gradient was not finite; the coordinator's adapters wait"

    step: int


@dataclass(frozen=True, slots=True)
class Telemetry(RoundEvent):
    """What a round cost."""

    seconds: float
    """Since the round's start."""
    devices: Mapping[str, Mapping[str, Any]]
    """By device: tokens, seconds, bytes, memory, and what its board said."""
    late: Mapping[str, int] = field(default_factory=dict)
    """Messages that came too late for an earlier round, by device."""


@dataclass(frozen=True, slots=True)
class RoundDone(RunEvent):
    """A row of metrics is complete; row 0 is what was there before training."""

    row: Mapping[str, Any]
    boards: Mapping[str, Mapping[str, Any]]
    """What each board said of itself with its last sign of life, by device."""


@dataclass(frozen=True, slots=True)
class RoundSaved(RoundEvent):
    """A round is saved in mid-way, by the coordinator and by all of its members."""

    step: int
    """First step that is to be done from there."""
    seconds: float
    """What it took."""


@dataclass(frozen=True, slots=True)
class RoundUnsaved(RoundEvent):
    """Members did not save themselves in time; the last checkpoint counts."""

    LINE = "round {0.nth}: not saved at step {0.step}: no answer from {0.names}"

    step: int
    devices: Sequence[str]
    """Who did not."""

    @property
    def names(self) -> str:
        """Who did not, as text."""
        return some_names(self.devices)


@dataclass(frozen=True, slots=True)
class RoundHeld(RoundEvent):
    """A round is saved, and goes on from there once devices that have left are back."""

    LINE = "round {0.nth} is saved at step {0.step} and waits for {0.names}"

    step: int
    devices: Sequence[str]

    @property
    def names(self) -> str:
        """Who is waited for."""
        return some_names(self.devices)
