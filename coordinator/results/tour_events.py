"""What can happen on the way of a round or a tour, as values. The rest is in `events.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.results.events import DeviceEvent, RoundEvent, RunEvent


@dataclass(frozen=True, slots=True)
class TourBegun(DeviceEvent):
    """A device trains steps of its own from now on, and nobody waits for them."""

    DOING = "steps {0.step}..{0.last_step} from version {0.version}"

    version: int
    """Merges whose result it begins with."""
    step: int
    """First step, by the device's own count."""
    end_step: int

    @property
    def last_step(self) -> int:
        """Last step."""
        return self.end_step - 1


@dataclass(frozen=True, slots=True)
class ToursMerged(RunEvent):
    """What devices have brought is in a new version."""

    version: int
    updates: Mapping[str, Sequence[int]]
    """Merges that each update had missed, by device."""
    standing: Mapping[str, tuple[int, int]]
    """The version that devices on tour began with, and the merges since, by device."""
    dropped: Sequence[str]
    """Devices whose tours were too old to go on."""

    @property
    def text(self) -> str:
        """What was merged, and how far behind the others are."""
        missed = [f"{name} {_numbers(ages)}" for name, ages in self.updates.items()]
        behind = [f"{name} {age}" for name, (_, age) in self.standing.items() if age]
        parts = [f"version {self.version}: merges missed by each update: {', '.join(missed)}"]
        if behind:
            parts.append(f"by those on their way: {', '.join(behind)}")
        if self.dropped:
            parts.append(f"begin anew: {', '.join(self.dropped)}")
        return "; ".join(parts)


def _numbers(values: Sequence[int]) -> str:
    return "+".join(map(str, values))


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
        return ", ".join(self.devices)


@dataclass(frozen=True, slots=True)
class RoundHeld(RoundEvent):
    """A round is saved, and goes on from there once devices that have left are back."""

    LINE = "round {0.nth} is saved at step {0.step} and waits for {0.names}"

    step: int
    devices: Sequence[str]

    @property
    def names(self) -> str:
        """Who is waited for."""
        return ", ".join(self.devices)
