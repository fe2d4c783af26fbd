"""A run begins, pauses, goes on and ends."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from coordinator.results.events.event import RunEvent
from edge_sdk.lora.targets import Coverage


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

    folder: Path

    @property
    def text(self) -> str:
        """How to go on, as a shell takes it."""
        return f"paused; go on with: coordinator resume {shlex.quote(str(self.folder))}"


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
