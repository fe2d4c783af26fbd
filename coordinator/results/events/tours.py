"""Rounds without a barrier: devices go on tours, and what they bring is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.results.events.devices import DeviceEvent
from coordinator.results.events.event import RunEvent, some_names


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
        parts = [f"version {self.version}: merges missed by each update: {some_names(missed)}"]
        if behind:
            parts.append(f"by those on their way: {some_names(behind)}")
        if self.dropped:
            parts.append(f"begin anew: {some_names(self.dropped)}")
        return "; ".join(parts)


def _numbers(values: Sequence[int]) -> str:
    return "+".join(map(str, values))
