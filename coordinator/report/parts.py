"""What a report is made of: sections of charts, tables and sentences. Knows no run and no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from coordinator.report.svg import COLOURS, ChartLine, line_chart

MOST_LINES = COLOURS
"""Devices that are lines of their own; more are drawn as the lowest, the middle and the highest."""


class Chart(NamedTuple):
    """A chart and what it shows."""

    title: str
    svg: str
    legend: Sequence[tuple[int, str]] = ()
    """Colours and what has them."""
    caption: str = ""


class Grid(NamedTuple):
    """A table; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_texts: int = 1
    """So many columns are text, the others numbers."""


class Section(NamedTuple):
    """A part of the page under one heading."""

    title: str
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    grids: Sequence[Grid] = ()


def chart_of(
    title: str, lines: Sequence[ChartLine], x: str, y: str, caption: str = ""
) -> list[Chart]:
    """Return a chart of *lines*; none where they have no point."""
    drawn = [line for line in lines if line.points]
    svg = line_chart(drawn, x, y)
    if not svg:
        return []
    legend = [(line.colour, line.label) for line in drawn] if len(drawn) > 1 else []
    return [Chart(title, svg, legend, caption)]


def by_device(
    points: Mapping[str, Sequence[tuple[float, float]]], *, stepped: bool = False
) -> list[ChartLine]:
    """Return a line for each device; of many devices three that say where they all are."""
    if len(points) <= MOST_LINES:
        # Equal lines lie side by side instead of hiding each other.
        most = max((y for own in points.values() for _, y in own), default=0.0)
        shift = 0.012 * most if stepped else 0.0
        return [
            ChartLine(name, [(x, y + index * shift) for x, y in own], index, is_stepped=stepped)
            for index, (name, own) in enumerate(sorted(points.items()))
        ]
    at: dict[float, list[float]] = {}
    for own in points.values():
        for x, y in own:
            if math.isfinite(y):
                at.setdefault(x, []).append(y)
    found = sorted(at.items())
    drawn = {
        "lowest": [(x, min(ys)) for x, ys in found],
        "middle": [(x, median(ys)) for x, ys in found],
        "highest": [(x, max(ys)) for x, ys in found],
    }
    return [
        ChartLine(f"{label} of {len(points)} devices", own, index, is_dashed=label != "middle")
        for index, (label, own) in enumerate(drawn.items())
    ]


def text_of(value: float | None, form: str = ",.0f") -> str:
    """Return a number as a person reads it; `-` where it is not known."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def mebibytes(num_bytes: float | None) -> str:
    """Return memory in MiB."""
    return text_of(None if num_bytes is None else num_bytes / 2**20)


def megabytes(num_bytes: float | None) -> str:
    """Return traffic in MB."""
    value = None if num_bytes is None else num_bytes / 1e6
    return text_of(value, ",.1f" if value is not None and value < 100 else ",.0f")
