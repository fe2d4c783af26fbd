"""Joules since a meter was started: from the hardware's counters, else from power and time.

Pure: is told the time and the readings, and knows no file and no clock.
"""

from __future__ import annotations

from profiler.power import Counter
from profiler.readings import Reading, unknown


class Meter:
    """Adds up what is drawn; `update` has to be called several times a minute."""

    def __init__(self) -> None:
        self._counted = 0.0
        self._counters: dict[str, Counter] = {}
        self._integrated = 0.0
        self._last: tuple[float, float] | None = None
        self._power = unknown("W")

    def update(self, now_s: float, power: Reading, counters: dict[str, Counter]) -> None:
        """Take note of what is drawn at *now_s*, and of where the counters stand."""
        for name, counter in counters.items():
            if name in self._counters:
                self._counted += _difference(self._counters[name], counter)
        self._counters |= counters
        if power.value is None:
            self._last = None  # a gap is not bridged
            return
        if self._last is not None:
            then_s, watts = self._last
            self._integrated += (now_s - then_s) * (watts + power.value) / 2
        self._last, self._power = (now_s, power.value), power

    def joules(self) -> Reading:
        """Return what was drawn since the first update.

        Rails of a board come before counters, which count the processor and the GPU but not the
        board around them and are `estimated` for that.
        """
        if self._power.value is not None and not (self._counters and self._power.estimated):
            source = f"{self._power.source}, over time"
            return Reading(self._integrated, source, "J", self._power.estimated)
        if self._counters:
            return Reading(self._counted, " + ".join(self._counters), "J", estimated=True)
        return unknown("J")


def _difference(before: Counter, after: Counter) -> float:
    gained = after.joules - before.joules
    if gained >= 0:
        return gained
    # A wrapped counter; without a known end it was reset, by a driver that was loaded anew.
    return gained + after.wraps_at_j if after.wraps_at_j else after.joules
