"""Watches the machine while a run goes on: readings once a second, their extremes, and events.

A thread calls `sample`; tests call it themselves. What is sent with a heartbeat is `telemetry`,
which reads nothing and so never waits. What follows from an event is not decided here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from profiler.sensors.board import power_mode
from profiler.sensors.heat import HARMLESS, Throttling, temperature, temperatures, throttling
from profiler.sensors.load import (
    CpuTimes,
    cpu_clock,
    cpu_clock_max,
    cpu_load,
    cpu_times,
    gpu_clock,
    gpu_clock_max,
    gpu_load,
)
from profiler.sensors.memory import memory_info, rss
from profiler.sensors.memory_budget import reserve_bytes
from profiler.sensors.power import EnergyMeter, counters, power, rails
from profiler.sensors.readings import Reading
from profiler.sensors.sources import HERE, Sources

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
# Throttling comes in bursts; it has ended when none has been seen for so long.
QUIET_PERIOD_S = 10.0
# Memory counts as low below this share of what a run leaves alone, and as back above the whole.
LOW_SHARE = 0.5

THROTTLING_BEGAN = "throttling_began"
THROTTLING_ENDED = "throttling_ended"
POWER_MODE_CHANGED = "power_mode_changed"
LOW_MEMORY = "low_memory"
MEMORY_BACK = "memory_back"


@dataclass(frozen=True, slots=True)
class BoardEvent:
    """Something that may make another plan the better one."""

    at_s: float
    """Time in seconds on the monitor's clock."""
    kind: str
    """One of the names in capitals above."""
    text: str


@dataclass(frozen=True, slots=True)
class Range:
    """Least, mean and most of one reading since the monitor was made."""

    least: float
    mean: float
    most: float
    unit: str
    num_samples: int


class Monitor:
    """Samples in the background. Use as a context manager, or call `start` and `stop`.

    Args:
        sources: Where to look.
        interval_s: Seconds between two samples.
        clock: Seconds that never go back.
        on_event: Called for each event by the thread that samples; must be quick.
    """

    def __init__(
        self,
        sources: Sources = HERE,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[BoardEvent], None] = lambda _event: None,
    ) -> None:
        self._sources, self._interval_s, self._clock = sources, interval_s, clock
        self._on_event = on_event
        self._lock = threading.Lock()
        self._last: dict[str, Reading] = {}
        self._ranges: dict[str, Range] = {}
        self._events: list[BoardEvent] = []
        self._meter = EnergyMeter()
        self._times: CpuTimes | None = None
        self._counts: dict[str, int] | None = None
        self._slow_s: float | None = None  # when throttling was seen last; None while there is none
        self._mode: object = None
        self._is_low = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- reading ----

    def sample(self) -> dict[str, Reading]:
        """Read everything once, take note of it, and return it."""
        now_s, found = self._clock(), self._read()
        slow, mode = throttling(self._sources), power_mode(self._sources).value
        with self._lock:
            self._last = found
            for name, reading in found.items():
                self._extend(name, reading)
            events = [*self._judge_speed(now_s, slow), *self._judge_memory(now_s)]
            if self._mode is not None and mode != self._mode:
                text = f"power mode is {mode}, was {self._mode}"
                events.append(BoardEvent(now_s, POWER_MODE_CHANGED, text))
            self._mode = mode
            self._events += events
        for event in events:
            self._on_event(event)
        return found

    def _read(self) -> dict[str, Reading]:
        sources, each = self._sources, rails(self._sources)
        draw, before = power(sources, each), self._times
        self._times = cpu_times(sources)
        self._meter.update(self._clock(), draw, counters(sources))
        memory = memory_info(sources.root)
        return {
            "memory_total": memory.total,
            "memory_available": memory.available,
            "process_rss": rss(sources.root),
            "temperature": temperature(temperatures(sources)),
            "cpu_load": cpu_load(before, self._times),
            "cpu_clock": cpu_clock(sources),
            "cpu_clock_max": cpu_clock_max(sources),
            "gpu_load": gpu_load(sources),
            "gpu_clock": gpu_clock(sources),
            "gpu_clock_max": gpu_clock_max(sources),
            "power": draw,
            "energy": self._meter.joules(),
        }

    def _extend(self, name: str, reading: Reading) -> None:
        value, before = reading.value, self._ranges.get(name)
        if value is None:
            return
        if before is None:
            self._ranges[name] = Range(value, value, value, reading.unit, 1)
            return
        count = before.num_samples + 1
        self._ranges[name] = Range(
            min(before.least, value),
            before.mean + (value - before.mean) / count,
            max(before.most, value),
            reading.unit,
            count,
        )

    # ---- judging ----

    def _judge_speed(self, now_s: float, slow: Throttling) -> list[BoardEvent]:
        counted = self._counts or {}
        reasons = list(slow.now)
        for name, count in slow.counts.items():
            if name not in HARMLESS and count > counted.get(name, count):
                reasons.append(name.replace("_", " "))
        self._counts = slow.counts
        if reasons:
            is_new, self._slow_s = self._slow_s is None, now_s
            text = ", ".join(reasons)
            return [BoardEvent(now_s, THROTTLING_BEGAN, text)] if is_new else []
        if self._slow_s is not None and now_s - self._slow_s >= QUIET_PERIOD_S:
            self._slow_s = None
            return [BoardEvent(now_s, THROTTLING_ENDED, f"none for {QUIET_PERIOD_S:.0f} s")]
        return []

    def _judge_memory(self, now_s: float) -> list[BoardEvent]:
        total, left = self._last["memory_total"].value, self._last["memory_available"].value
        if total is None or left is None:
            return []
        kept = reserve_bytes(total)
        text = f"{left / 2**20:,.0f} of {total / 2**20:,.0f} MiB available"
        if not self._is_low and left < LOW_SHARE * kept:
            self._is_low = True
            return [BoardEvent(now_s, LOW_MEMORY, text)]
        if self._is_low and left > kept:
            self._is_low = False
            return [BoardEvent(now_s, MEMORY_BACK, text)]
        return []

    # ---- telling ----

    def telemetry(self) -> dict[str, float]:
        """Return what is known since the last sample, for a heartbeat; unknown is left out.

        Names are those of the readings; `throttled` is 1 or 0. Any thread may call this.
        """
        with self._lock:
            known = {n: float(r.value) for n, r in self._last.items() if r.value is not None}
            return {**known, "throttled": float(self._slow_s is not None)} if self._last else {}

    def joules(self) -> Reading:
        """Return the energy since the first sample."""
        return self._meter.joules()

    def ranges(self) -> dict[str, Range]:
        """Return least, mean and most of each reading that has been known."""
        with self._lock:
            return dict(self._ranges)

    def take_events(self) -> list[BoardEvent]:
        """Return the events since the last call."""
        with self._lock:
            events, self._events = self._events, []
            return events

    # ---- the thread ----

    def start(self) -> Monitor:
        """Take a first sample, and go on in the background."""
        assert self._thread is None, "started already"
        self.sample()
        self._thread = threading.Thread(target=self._run, name="edgesplit-monitor", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.sample()
            except Exception:  # noqa: BLE001 - a board that cannot be read is no reason to stop
                log.warning("monitor.unreadable", exc_info=True)

    def stop(self) -> None:
        """End the thread; what was found remains."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
