"""A device's board while it takes part: what its heartbeats tell, and whether it has changed.

Joins what the board says of itself (`profiler.sensors.monitor`) with the steps that it does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from profiler.sensors.monitor import (
    INTERVAL_S,
    POWER_MODE_CHANGED,
    THROTTLING_BEGAN,
    THROTTLING_ENDED,
    BoardEvent,
    Monitor,
)
from profiler.sensors.sources import HERE, Sources

log = logging.getLogger(__name__)

# Time and energy of a step are means over this many; energy is read once a second.
STEPS = 32
# Events after which a step may take longer or shorter than before.
OTHER_SPEED = (POWER_MODE_CHANGED, THROTTLING_BEGAN, THROTTLING_ENDED)


class BoardMonitor:
    """Watches the board as a context manager; any thread may ask.

    Args:
        sources: Where to look.
        interval_s: Seconds between two looks.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        sources: Sources = HERE,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._monitor = Monitor(sources, interval_s=interval_s, clock=clock, on_event=self._told)
        self._has_changed = threading.Event()
        self._lock = threading.Lock()
        self._ends: deque[tuple[float, float | None]] = deque(maxlen=STEPS + 1)

    def __enter__(self) -> BoardMonitor:
        self._monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._monitor.stop()

    def _told(self, event: BoardEvent) -> None:
        log.warning("board.%s %s", event.kind, event.text)
        if event.kind in OTHER_SPEED:
            self._has_changed.set()

    def take_change(self) -> bool:
        """Return whether the board's speed may have changed since the last call."""
        if not self._has_changed.is_set():
            return False
        self._has_changed.clear()
        return True

    def step(self) -> None:
        """Note that a step of training has ended."""
        with self._lock:
            self._ends.append((self._clock(), self._monitor.joules().value))

    def telemetry(self) -> dict[str, float]:
        """Return the board's readings, and seconds and joules of the latest steps.

        `step_time` and `step_energy` count all between the ends of two steps: waiting, aggregation
        and evaluation too. What is unknown is left out.
        """
        numbers = self._monitor.telemetry()
        with self._lock:
            ends = list(self._ends)
        if len(ends) < 2:
            return numbers
        (began_s, before_j), (ended_s, after_j), steps = ends[0], ends[-1], len(ends) - 1
        numbers["step_time"] = (ended_s - began_s) / steps
        if before_j is not None and after_j is not None:
            numbers["step_energy"] = (after_j - before_j) / steps
        return numbers
