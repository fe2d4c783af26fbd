"""What an event of a run is, and who looks on.

Watchers get events (`watchers.py`) and can change nothing. A new kind of event is a class in the
file of its kind here; where a person should read of it, `text` is the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

# Devices that are named in a line.
MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened in a run."""

    LINE: ClassVar[str] = ""
    """What a person reads of it, `0` being the event; empty where a watcher finds its own words."""

    @property
    def text(self) -> str:
        """What a person reads of it, in lines."""
        return self.LINE.format(self)


@dataclass(frozen=True, slots=True)
class RoundEvent(RunEvent):
    """Something that happened in a round, or between two."""

    round: int
    """Counted from 0, as in messages and files."""

    @property
    def nth(self) -> int:
        """The round as people count: from 1."""
        return nth(self.round)


def nth(round_: int) -> int:
    """Return the number of a round as people count, who begin with 1."""
    return round_ + 1


def some_names(names: Sequence[str], most: int = MOST_NAMED) -> str:
    """Return *names* for a line that a person reads: of many the first, and how many more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Watcher(Protocol):
    """Somebody who looks on."""

    def see(self, event: RunEvent) -> None:
        """Take notice of *event*; called in the run's own thread, in the order of events."""
