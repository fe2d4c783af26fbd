"""How often a key may send what nobody has asked it for. Pure: the clock is an argument.

What was asked for is free: a plan may be answered by one Ready, a round by one EvalReport. All else
is counted, by key and not by session, so that a new session brings nothing new.

An honest device stays far below. It greets twice when it starts; a supervisor starts a program
again that was killed for want of memory at most 20 times in 15 minutes (`edge_sdk/supervise.py`),
which are 40 greetings. A bad link brings no greeting at all, as its session goes on; one that is
dead for `patience_s` brings one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from edge_sdk.errors import RefusedError
from edge_sdk.protocol.messages import (
    EvalReport,
    Failure,
    Goodbye,
    Hello,
    Pause,
    Paused,
    PlanAssigned,
    Profiled,
    Ready,
    RoundStart,
    Welcome,
)


class Rate(NamedTuple):
    """So many at once, and one more after each so many seconds."""

    burst: int
    every_s: float


RATES: dict[type, Rate] = {
    Hello: Rate(60, 2.0),
    Ready: Rate(60, 2.0),
    Goodbye: Rate(60, 2.0),
    EvalReport: Rate(60, 2.0),
    Paused: Rate(60, 2.0),
    # Each of these may cost a plan for all.
    Profiled: Rate(24, 10.0),
    Failure: Rate(24, 10.0),
}
# What a message to a device asks for.
ASKS: dict[type, tuple[type, ...]] = {
    Welcome: (Profiled,),
    PlanAssigned: (Ready,),
    RoundStart: (Ready, EvalReport),
    Pause: (Paused,),
}
# Lines of the log and of events.jsonl about what was wrong with what a device sent.
LINES = Rate(30, 10.0)
# A device that does not answer collects no more than this.
MOST_ASKED = 4


@dataclass(slots=True)
class _Bucket:
    left: float
    at_s: float


@dataclass
class Allowance:
    """What each key has left."""

    clock: Callable[[], float]
    """Seconds of a clock that never goes back."""
    _buckets: dict[tuple[str, object], _Bucket] = field(default_factory=dict)
    _asked: dict[tuple[str, type], int] = field(default_factory=dict)

    def asked(self, device: str, message: object) -> None:
        """Note that a message to a device asks for others."""
        for kind in ASKS.get(type(message), ()):
            place = device, kind
            self._asked[place] = min(MOST_ASKED, self._asked.get(place, 0) + 1)

    def take(self, device: str, message: object) -> None:
        """Count a message.

        Raises:
            RefusedError: its key has sent too many of them.
        """
        kind = type(message)
        rate, place = RATES.get(kind), (device, kind)
        if rate is None:
            return
        if self._asked.get(place):
            self._asked[place] -= 1
        elif not self._has_left(device, kind, rate):
            raise RefusedError(
                f"more than {rate.burst} {kind.__name__} that nobody asked for, and one every "
                f"{rate.every_s:g} s; this session ends"
            )

    def may_tell(self, device: str) -> bool:
        """Return whether what a device did wrong deserves another line."""
        return self._has_left(device, "lines", LINES)

    def _has_left(self, device: str, what: object, rate: Rate) -> bool:
        now_s = self.clock()
        bucket = self._buckets.setdefault((device, what), _Bucket(rate.burst, now_s))
        bucket.left = min(rate.burst, bucket.left + (now_s - bucket.at_s) / rate.every_s)
        bucket.at_s = now_s
        if bucket.left < 1.0:
            return False
        bucket.left -= 1.0
        return True
