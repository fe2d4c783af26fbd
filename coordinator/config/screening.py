"""The `screening` section of a run's configuration: what uploads must be like to be joined."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreeningConfig:
    """What becomes of uploads that are unlike those of the others."""

    factor: float = 10.0
    """An upload that has moved a weight further than this many times the median of the other
    devices, and further than any honest one is likely to, is left out of the round; 0 compares
    nothing. What the optimizer cannot have done is refused in any case."""

    def __post_init__(self) -> None:
        if not (self.factor == 0.0 or 1.0 <= self.factor <= 1e9):
            raise ValueError(f"factor must be 0 or in 1..1e9, got {self.factor}")
