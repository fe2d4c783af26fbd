"""What can happen in a run, as values.

Watchers get them (`watchers.py`) and can change nothing. A new kind of event is a class here; where
a person should read of it, `text` is the line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from coordinator.planning.plan_set import PlanSet
from edge_sdk.lora.targets import Coverage
from edge_sdk.protocol.messages import StepReport
from edge_sdk.protocol.plan import Plan


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened in a run."""

    LINE: ClassVar[str] = ""
    """What a person reads of it, `0` being the event; empty where a watcher finds its own words."""

    @property
    def text(self) -> str:
        """What a person reads of it, in lines."""
        return self.LINE.format(self)


@dataclass(frozen=True, slots=True)
class RoundEvent(RunEvent):
    """Something that happened in a round, or between two."""

    round: int
    """Counted from 0, as in messages and files."""

    @property
    def nth(self) -> int:
        """The round as people count: from 1."""
        return nth(self.round)


def nth(round_: int) -> int:
    """Return the number of a round as people count, who begin with 1."""
    return round_ + 1


class Watcher(Protocol):
    """Somebody who looks on."""

    def see(self, event: RunEvent) -> None:
        """Take notice of *event*; called in the run's own thread, in the order of events."""


# ---- the run ----


@dataclass(frozen=True, slots=True)
class Preparing(RunEvent):
    """Something takes a while before devices can connect, or is to be known by then."""

    LINE = "{0.what}"

    what: str


@dataclass(frozen=True, slots=True)
class FolderKnown(RunEvent):
    """The folder of the run is there, and its files can be read."""

    folder: Path


@dataclass(frozen=True, slots=True)
class Listening(FolderKnown):
    """Devices can connect."""

    LINE = "run {0.folder}: listening at {0.address}"

    address: str


@dataclass(frozen=True, slots=True)
class RunStarted(RunEvent):
    """A run begins, or goes on after a stop."""

    run: str
    step: int
    """First step that is to be done."""


@dataclass(frozen=True, slots=True)
class WeightsAdapted(RunEvent):
    """Which weights the run trains."""

    coverage: Coverage

    @property
    def text(self) -> str:
        """How much of the blocks has adapters."""
        return self.coverage.text


@dataclass(frozen=True, slots=True)
class CheckpointDamaged(RunEvent):
    """A checkpoint is not as it was written; an older one is used in its place."""

    LINE = "{0.checkpoint}: damaged: {0.reason}; set aside as {0.aside}, going on from {0.used}"

    checkpoint: str
    """Name of its folder."""
    reason: str
    aside: str
    """Name of the folder that it lies in now."""
    used: str
    """Name of the folder of the one that is used."""


@dataclass(frozen=True, slots=True)
class AlreadyComplete(RunEvent):
    """A run that is to be resumed has come to its end before."""

    LINE = "run {0.folder} is complete; `rounds=N` with more of them goes on"

    folder: Path


@dataclass(frozen=True, slots=True)
class RunFinished(RunEvent):
    """The event loop has ended."""

    outcome: str


@dataclass(frozen=True, slots=True)
class RunPaused(RunEvent):
    """A stopped run is saved, and can go on."""

    LINE = "stopped; go on with: coordinator resume {0.folder}"

    folder: Path


@dataclass(frozen=True, slots=True)
class StopAsked(RunEvent):
    """Somebody wants the run to be left."""

    kind: str = "pause"
    """`pause` or `stop`."""
    after_round: bool = False
    is_urgent: bool = True
    """Whether by Ctrl-C or SIGTERM."""

    @property
    def text(self) -> str:
        """What will happen."""
        if self.is_urgent:  # a step may take long, or wait for a frozen device
            return "stopping after this step; a second Ctrl-C leaves at once"
        doing = {"pause": "pausing", "stop": "stopping"}[self.kind]
        return f"{doing} after this {'round' if self.after_round else 'step'}, as was asked for"


@dataclass(frozen=True, slots=True)
class StopBegun(RunEvent):
    """Devices have been asked to save their state."""

    LINE = "stopping at step {0.step}; devices save their state"

    step: int


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
class RoundStarted(RoundEvent):
    """The devices of a round train from now on."""

    attempt: int
    devices: Sequence[str]
    boards: Mapping[str, Mapping[str, Any]]
    """What each board said of itself with its last sign of life, by device."""


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
        return f"going on without {', '.join(self.devices)}: not back yet"


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
        return f"{self.what}: waiting {self.seconds:.0f} s for {', '.join(self.devices)}{took}"


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
        return "; ".join([f"round {self.nth} waits for {missing} more {noun}: {here}", *known])


@dataclass(frozen=True, slots=True)
class DevicesCutOff(RoundEvent):
    """A round goes on without members that are too slow for it."""

    devices: Sequence[str]
    deadline_s: float

    @property
    def text(self) -> str:
        """Who is too late, and what comes of it."""
        names = ", ".join(self.devices)
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
        whom = f" for {', '.join(self.devices)}" if self.devices else ""
        return f"stopping in mid-step, which waits{whom}; the last checkpoint counts"


@dataclass(frozen=True, slots=True)
class StepDone(RunEvent):
    """A device has finished a step."""

    device: str
    report: StepReport
    end_step: int
    """First step after the round."""
    traffic: tuple[int, int] | None
    """Bytes up and down in the device's session; None without a connection."""
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
class PlanMade(RoundEvent):
    """Devices and coordinator are to run other plans."""

    plans: PlanSet
    reasons: Sequence[str]
    importance: Mapping[str, float]
    """What the ranks were chosen by; empty where nothing is measured."""
    changed: Collection[str] | None = None
    """Devices that are to run something else than before; None: all, as with first plans."""

    @property
    def text(self) -> str:
        """A line for each reason, and one for each new plan."""
        lines = [f"plans from round {self.nth} on: {why}" for why in self.reasons]
        if self.changed is None or self.changed:
            lines += [f"  {line}" for line in self.plans.lines(self.changed)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class PlanShrunk(RoundEvent):
    """A device could not do its plan, and is to run a smaller one."""

    LINE = "{0.device} {0.reason}"

    device: str
    reason: str
    plans: Mapping[str, Plan]
    """What everybody is to run, by device."""


# ---- devices ----


@dataclass(frozen=True, slots=True)
class MessageRejected(RunEvent):
    """A packet of a device could not be read."""

    LINE = "{0.device}: rejected: {0.error}"

    device: str
    error: str


@dataclass(frozen=True, slots=True)
class DeviceEnrolled(RunEvent):
    """A device has had its key registered; it has not joined yet."""

    LINE = "{0.device}: enrolled from {0.address}, with the key {0.fingerprint}"

    device: str
    fingerprint: str
    address: str


@dataclass(frozen=True, slots=True)
class DeviceEvent(RunEvent):
    """A device joined, left, or does something else than before."""

    LINE = "{0.device}: {0.doing}"
    DOING: ClassVar[str] = ""
    """What it does now, in a few words, `0` being the event."""

    device: str

    @property
    def doing(self) -> str:
        """What it does now, in a few words."""
        return self.DOING.format(self)


@dataclass(frozen=True, slots=True)
class DeviceStatus(DeviceEvent):
    """A device is on its way to a round."""

    DOING = "{0.status}"

    status: str
    is_delay: bool = False
    """Whether the run, or the device, is the later for it."""


@dataclass(frozen=True, slots=True)
class DeviceJoined(DeviceEvent):
    """A device is ready to train."""

    DOING = "ready"

    split: int
    """Blocks that it holds."""
    samples: int
    """Training samples that it has."""
    left_out: int = 0
    """Rows that it skips or drops."""
    cut: int = 0
    """Samples that it cuts."""

    @property
    def doing(self) -> str:
        """What it does now, and how many of its rows it does not take as they stand."""
        parts = {"rows left out": self.left_out, "samples cut": self.cut}
        lost = [f"{count:,} {what}" for what, count in parts.items() if count]
        return ", ".join([self.DOING, *lost])


@dataclass(frozen=True, slots=True)
class DeviceLeft(DeviceEvent):
    """A device that was ready to train, or on its way to it, is gone."""

    DOING = "left: {0.reason}"

    reason: str
