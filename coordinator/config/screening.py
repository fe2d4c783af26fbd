"""The `screening` section of a run's configuration: what uploads must be like to be joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreeningConfig:
    """What becomes of uploads that are unlike those of the others."""

    factor: float = 10.0
    """An upload that has moved a weight further than this many times the median of the other
    devices, and all weights together further than these devices scatter, is left out of the round;
    0 compares nothing. What the optimizer cannot have done is refused in any case."""

    gradients: float = 4.0
    """With `labels: device`, most that the gradients of a device's step count with, in medians of
    the other devices, each at its largest so far; what is beyond is scaled down, and nobody is
    refused. 0: all count as they come. Needs three devices."""
    method: Literal["none", "krum", "trimmed-mean"] = "none"
    """How a few devices are kept from deciding for all, where not all are trusted. `krum` joins
    nothing of the `hostile` devices that are furthest from those next to them, in every round,
    honest ones included; it needs `2 hostile + 3` devices to leave out as many. `trimmed-mean`
    leaves the `hostile` smallest and largest of each number of the factors out, and means the rest,
    whatever the numbers of samples; not with `aggregation: exact`, whose factors have nothing in
    common."""
    hostile: int = 1
    """Most devices that are taken to be hostile at once, with a `method`; fewer than half."""
    clip: float = 0.0
    """Most that a device counts with in what it has moved a weight by, in medians of all devices;
    0: all counts. Needs three devices."""

    def __post_init__(self) -> None:
        if not (self.factor == 0.0 or 1.0 <= self.factor <= 1e9):
            raise ValueError(f"factor must be 0 or in 1..1e9, got {self.factor}")
        if not (self.gradients == 0.0 or 1.0 <= self.gradients <= 1e9):
            raise ValueError(f"gradients must be 0 or in 1..1e9, got {self.gradients}")
        if self.hostile < 1:
            raise ValueError(f"hostile must be at least 1, got {self.hostile}")
        if not 0.0 <= self.clip <= 1e9:
            raise ValueError(f"clip must be in 0..1e9, got {self.clip}")
