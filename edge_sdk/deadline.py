"""A moment on the monotonic clock until which somebody is willing to wait."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock; boards without RTC battery wake up in 1970."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline *seconds* from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Return the seconds left, 0.0 once it has passed."""
        return max(0.0, self.at_s - time.monotonic())

    def has_passed(self) -> bool:
        """Return whether nothing is left of it."""
        return time.monotonic() >= self.at_s
