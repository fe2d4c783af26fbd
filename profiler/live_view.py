"""The live view of `profiler watch`: a screen of its own with rich, plain text without.

Draws what a `Monitor` has sampled; reads nothing itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from profiler.sensors.board import board, power_mode
from profiler.sensors.monitor import BoardEvent, Monitor, Range
from profiler.sensors.readings import Reading, amount
from profiler.sensors.sources import HERE, Sources

# Widths in letters; a line has 79.
NAME, NOW, BAR, CELL = 17, 11, 12, 11
KEPT_EVENTS = 6
# What has a natural end is drawn as a bar: a reading, and what it is measured against.
AGAINST = {"cpu_clock": "cpu_clock_max", "gpu_clock": "gpu_clock_max"}
HIDDEN = frozenset(("memory_total", "cpu_clock_max", "gpu_clock_max"))
CLEAR = "\x1b[H\x1b[2J"


def watch(
    *,
    count: int | None,
    interval_s: float,
    as_json: bool,
    sources: Sources = HERE,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show *count* samples, or samples until Ctrl-C.

    Args:
        count: How many; None does not stop.
        interval_s: Seconds between two.
        as_json: A line of JSON for each instead of a view.
        sources: Where to look.
        sleep: Waits so many seconds, for tests.
    """
    monitor, events = Monitor(sources), list[BoardEvent]()
    title = str(board(sources).value or "this machine")
    monitor.sample()  # loads are differences
    number = 0
    with _screen(is_live=count is None and not as_json) as draw:
        while count is None or number < count:
            sleep(interval_s)
            found, number = monitor.sample(), number + 1
            fresh = monitor.take_events()
            events = [*events, *fresh][-KEPT_EVENTS:]
            if as_json:
                _say(json.dumps(_row(found, monitor, fresh)) + "\n")
                continue
            mode = power_mode(sources).value
            head = f"{title}, power mode {mode}" if mode else title
            draw("\n".join([head, "", *_lines(found, monitor.ranges()), "", *_told(events)]))


def _row(found: dict[str, Reading], monitor: Monitor, events: list[BoardEvent]) -> dict[str, Any]:
    return {
        "readings": {name: reading._asdict() for name, reading in found.items()},
        "throttled": bool(monitor.telemetry()["throttled"]),
        "events": [{"kind": event.kind, "text": event.text} for event in events],
    }


def _lines(found: dict[str, Reading], ranges: dict[str, Range]) -> Iterator[str]:
    titles = "".join(f"{title:>{CELL}} " for title in ("least", "mean", "most"))
    yield f"{'':<{NAME}}{'now':>{NOW}}  {'':<{BAR}}  {titles}".rstrip()
    for name, reading in found.items():
        if name in HIDDEN:
            continue
        line = f"{name:<{NAME}}{amount(reading):>{NOW}}  {_bar(_share(name, found)):<{BAR}}"
        if name in ranges and name != "energy":
            one = ranges[name]
            cells = (amount(reading._replace(value=v)) for v in (one.least, one.mean, one.most))
            line += "  " + " ".join(f"{cell:>{CELL}}" for cell in cells)
        yield line.rstrip()


def _share(name: str, found: dict[str, Reading]) -> float | None:
    """Return how full the bar of a reading is; None for one without an end."""
    value = found[name].value
    if value is None:
        return None
    if found[name].unit == "%":
        return value / 100
    most = found[AGAINST[name]].value if name in AGAINST else None
    if found[name].unit == "B":
        most = found["memory_total"].value
    return value / most if most else None


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    full = round(BAR * min(1.0, max(0.0, share)))
    return "#" * full + "." * (BAR - full)


def _told(events: list[BoardEvent]) -> list[str]:
    return [f"{event.kind}: {event.text}" for event in events] or ["no events"]


@contextmanager
def _screen(*, is_live: bool) -> Iterator[Callable[[str], None]]:
    """Yield what draws a view: over the last one in a terminal, one below the other elsewhere."""
    if not is_live or not sys.stdout.isatty():
        yield lambda text: _say(text + "\n\n")
        return
    try:
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        yield lambda text: _say(CLEAR + text + "\n")
        return
    with Live(screen=True, auto_refresh=False) as live:
        yield lambda text: live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
