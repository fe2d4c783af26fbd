"""What is told for those who look on alone: the model's size, what boards offer, what is computed.

Nothing of a run depends on these events. What every run meets is in `results/events`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.results.events.devices import DeviceEvent
from coordinator.results.events.event import RunEvent
from profiler.profile import DeviceProfile


@dataclass(frozen=True, slots=True)
class ModelKnown(RunEvent):
    """How many blocks the model has that is cut."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class DeviceOffer(DeviceEvent):
    """A device has told what a run may use of it, before its plan or later."""

    DOING = "{0.status}"

    status: str
    profile: DeviceProfile


@dataclass(frozen=True, slots=True)
class Computed(RunEvent):
    """The coordinator has computed something."""

    what: str
    """`wave`, `forward`, `backward`, `adapters`, `evaluation`, `aggregation` or `checkpoint`."""
    devices: Sequence[str]
    """Whose micro-batches; empty where it is nobody's."""
    seconds: float
    """That it took."""
