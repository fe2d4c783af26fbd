"""Charts as SVG text in the colours of the page around them, light or dark.

Written by hand: a page of them takes milliseconds, and every run that ends makes one. Knows no run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP = 58, 14, 12
# Where the axis at the bottom is.
BASE = HEIGHT - 44
# A line with more points is thinned; one with fewer than the other number gets dots.
MOST_POINTS, MOST_DOTS = 400, 60
BAR, GAP = 16, 8
COLOURS = 8
"""So many colours the page has; then they begin again."""


class ChartLine(NamedTuple):
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_dashed: bool = False
    is_stepped: bool = False
    """Whether a value holds until the next one."""


class Bar(NamedTuple):
    """One bar, in parts."""

    label: str
    parts: Sequence[float]
    text: str
    """What stands at its end."""


class _Frame:
    """Where points lie in a chart."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        x_low, x_high = _range([x for x, _ in points], least=0.0)
        y_low, y_high = _range([y for _, y in points], least=None)
        self.x_ticks, self.y_ticks = ticks(x_low, x_high, 6), ticks(y_low, y_high, 5)
        self._x = x_low, x_high
        self._y = min(y_low, self.y_ticks[0]), max(y_high, self.y_ticks[-1])

    def x(self, value: float) -> float:
        """Return how far to the right *value* lies."""
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return how far down *value* lies."""
        low, high = self._y
        return BASE - (value - low) / (high - low) * (BASE - TOP)


def line_chart(lines: Sequence[ChartLine], x_label: str, y_label: str) -> str:
    """Return a chart of *lines*, empty without a point; points that are no number are left out."""
    kept = [line._replace(points=_thinned(line.points)) for line in lines]
    points = [point for line in kept for point in line.points]
    if not points:
        return ""
    frame, right = _Frame(points), WIDTH - RIGHT
    out = [_open(HEIGHT, f"{y_label} against {x_label}")]
    for tick in frame.y_ticks:
        y = f"{frame.y(tick):.1f}"
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        out.append(_text(LEFT - 6, frame.y(tick) + 4, short(tick), "end"))
    for tick in frame.x_ticks:
        out.append(_text(frame.x(tick), BASE + 16, short(tick), "middle"))
    out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{BASE}" y2="{BASE}"/>')
    out.append(_text((LEFT + right) / 2, HEIGHT - 8, x_label, "middle"))
    out.append(
        f'<text transform="translate(13 {(TOP + BASE) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for line in kept:
        out += _drawn(line, [(frame.x(x), frame.y(y)) for x, y in line.points])
    return "".join([*out, "</svg>"])


def _drawn(line: ChartLine, places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Yield a line, and its points with what they are."""
    if not places:
        return
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for x, y in places[1:]:
        path += f"H{x:.1f}V{y:.1f}" if line.is_stepped else f"L{x:.1f} {y:.1f}"
    dashes = " dashed" if line.is_dashed else ""
    yield f'<path class="s{line.colour % COLOURS}{dashes}" d="{path}"/>'
    if len(places) <= MOST_DOTS:
        for (x, y), (own_x, own_y) in zip(places, line.points, strict=True):
            said = escape(f"{line.label}: {own_y:.6g} at {own_x:.6g}")
            yield (
                f'<circle class="f{line.colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
                f"<title>{said}</title></circle>"
            )


def bar_chart(bars: Sequence[Bar], label: str) -> str:
    """Return horizontal bars; part n of each has colour n."""
    most = max((sum(bar.parts) for bar in bars), default=0.0)
    if not most > 0:
        return ""
    left = min(180, 12 + 7 * max(len(bar.label) for bar in bars))
    right = 12 + 7 * max(len(bar.text) for bar in bars)
    height = len(bars) * (BAR + GAP) + GAP
    out = [_open(height, label)]
    for index, bar in enumerate(bars):
        y, x = GAP + index * (BAR + GAP), float(left)
        name = bar.label if len(bar.label) <= 24 else bar.label[:23] + "~"
        out.append(_text(left - 6, y + BAR - 4, name, "end"))
        for colour, part in enumerate(bar.parts):
            width = part / most * (WIDTH - left - right)
            out.append(
                f'<rect class="f{colour % COLOURS}" x="{x:.1f}" y="{y}" width="{width:.1f}" '
                f'height="{BAR}"/>'
            )
            x += width
        out.append(_text(x + 6, y + BAR - 4, bar.text, "start"))
    return "".join([*out, "</svg>"])


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from *low* to *high*, at least two and not many more than *most*."""
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1.0, 2.0, 2.5, 5.0, 10.0) if power * f >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    found = [index * step for index in range(first, last + 1)]
    return found if len(found) > 1 else [low, high]


def short(value: float) -> str:
    """Return a number as an axis has room for it: 1.5k, 20M, 0.25."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _range(values: Sequence[float], least: float | None) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = low if least is None else min(low, least)
    if high > low:
        return low, high
    around = abs(low) * 0.1 or 1.0
    return (low, high + around) if least is not None else (low - around, high + around)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the numbers among *points*, evenly left out where there are many; the last stays."""
    real = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    every = -(-len(real) // MOST_POINTS) or 1
    kept = real[::every]
    return kept if not real or kept[-1] == real[-1] else [*kept, real[-1]]


def _open(height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
