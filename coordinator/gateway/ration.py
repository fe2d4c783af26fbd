"""A log that strangers cannot fill: so many lines a minute of a kind, and one that counts the rest.

Pure, the clock is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PERIOD_S = 60.0
MOST_LINES = 5


@dataclass(slots=True)
class Ration:
    """What was told in this period, and how much was not."""

    _num_untold: int = 0
    _told: set[str] = field(default_factory=set)
    _end_s: float = 0.0

    def may_tell(self, what: str, now_s: float) -> bool:
        """Return whether *what* deserves a line now: it is news, and there were few."""
        if not self._told:
            self._end_s = now_s + PERIOD_S
        if what in self._told or len(self._told) >= MOST_LINES:
            self._num_untold += 1
            return False
        self._told.add(what)
        return True

    def sum_up(self, now_s: float) -> int:
        """Return how much got no line in a period that is over, and begin the next; else 0."""
        if not self._told or now_s < self._end_s:
            return 0
        untold, self._num_untold = self._num_untold, 0
        self._told.clear()
        return untold
