"""Budgets for whoever is not trusted: of lines in a log, and of anything that costs something.

Pure, the clock is an argument.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from ipaddress import IPv6Address

from edge_sdk.errors import public_text

log = logging.getLogger(__name__)

PERIOD_S = 60.0
# Lines of a period: about one source, about all of them, and as many again that count the rest.
MOST_LINES_EACH = 5
MOST_LINES = 30


def source_of(address: str) -> str:
    """Return whom an address counts for: itself, or the network that one user of IPv6 has."""
    if ":" not in address:
        return address
    try:
        return f"{IPv6Address(int(IPv6Address(address.split('%')[0])) >> 64 << 64)}/64"
    except ValueError:
        return address


@dataclass(slots=True)
class Bucket:
    """So much at once, and so much a second in the long run."""

    capacity: float
    per_s: float
    _level: float = -1.0
    _at_s: float = 0.0

    def take(self, amount: float, now_s: float) -> bool:
        """Take *amount* if there is anything left, were it less; return whether there was."""
        if self._level < 0.0:
            self._level, self._at_s = self.capacity, now_s
        gained = (now_s - self._at_s) * self.per_s
        self._level, self._at_s = min(self.capacity, self._level + gained), now_s
        if self._level < 1.0:
            return False
        self._level = max(0.0, self._level - amount)
        return True


@dataclass(slots=True)
class Trouble:
    """The one place where trouble with peers becomes a line: each is told once, then counted.

    A source is the name of a device, or the address of a stranger. In a period it gets a line for
    each kind of trouble, few in all, and at the end one with the number of what got none.
    """

    _told: dict[str, set[str]] = field(default_factory=dict)
    _again: dict[tuple[str, str], int] = field(default_factory=dict)
    _num_lines: int = 0
    _num_untold: int = 0
    _end_s: float = 0.0

    def tell(self, event: str, source: str, text: str, now_s: float) -> bool:
        """Log a line unless the budget is spent; return whether it was.

        Args:
            event: What has happened, as `thing.verb`.
            source: Who is to blame for it.
            text: What else there is to say; it is cut and cleaned here.
            now_s: Time now.
        """
        if not self._told and not self._num_untold:
            self._end_s = now_s + PERIOD_S
        told = self._told.get(source)
        if told is not None and (event in told or len(told) >= MOST_LINES_EACH):
            self._again[source, event] = self._again.get((source, event), 0) + 1
            return False
        if self._num_lines >= MOST_LINES:
            self._num_untold += 1
            return False
        self._num_lines += 1
        self._told.setdefault(source, set()).add(event)
        log.warning("%s source=%s %s", event, source or "?", public_text(text))
        return True

    def sum_up(self, now_s: float) -> None:
        """Tell what was only counted in a period that is over, and begin the next."""
        if not (self._told or self._num_untold) or now_s < self._end_s:
            return
        for (source, event), times in self._again.items():
            log.warning("%s source=%s again=%d", event, source or "?", times)
        if self._num_untold:
            log.warning("gateway.trouble others=%d", self._num_untold)
        self._told.clear()
        self._again.clear()
        self._num_lines = self._num_untold = 0
