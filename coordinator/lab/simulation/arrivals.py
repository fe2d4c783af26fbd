"""What devices have sent, in the order in which it would reach the coordinator.

Devices run ahead of the modelled clock, as far as the messages that they have got allow. What they
send is kept here until its time has come, so that the coordinator knows at each moment what it
would know then. Equal times: in the order of the names, then in that of sending.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from coordinator.gateway.interface import Event


class Arrivals:
    """Events that are on their way."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str, int, Event]] = []
        self._last_s: dict[str, float] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, device: str, events: Iterable[Event], times_s: Iterable[float]) -> None:
        """Put what *device* has done on its way; what has no time of its own follows at once."""
        moments = iter(times_s)
        for event in events:
            last_s = self._last_s.get(device, 0.0)
            self._last_s[device] = at_s = max(last_s, next(moments, last_s))
            self._count += 1
            heapq.heappush(self._heap, (at_s, device, self._count, event))

    def first_s(self) -> float:
        """Return when the next event arrives; there must be one."""
        return self._heap[0][0]

    def until(self, now_s: float) -> list[Event]:
        """Return what has arrived by now."""
        events = []
        while self._heap and self._heap[0][0] <= now_s:
            events.append(heapq.heappop(self._heap)[-1])
        return events
