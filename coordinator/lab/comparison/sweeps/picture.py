"""The picture of a sweep: what is measured over the values of one key, a line for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from coordinator.lab.comparison.cells import (
    RunResult,
    at_chosen_rates,
    by_group,
    score,
    tried_rates,
)
from coordinator.lab.comparison.plots import (
    COLOURS,
    LOG_RATIO,
    MARKERS,
    Picture,
    legend_entries,
    make_panels,
    to_picture,
)
from coordinator.lab.comparison.search.grid import edge_of
from coordinator.lab.comparison.statistics.estimate import Estimate, estimate
from coordinator.lab.comparison.sweeps.grid import SweptKey, Value, shown
from coordinator.lab.comparison.sweeps.table import SweptRuns

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Bars of several methods at one value stand side by side, so far apart as shares of the axis.
BESIDE = 0.012


class _Place(NamedTuple):
    """One method at one value."""

    value: Value
    found: Estimate
    is_settled: bool


Lines = dict[str, dict[str, list[_Place]]]
"""Places by panel, and by method in it."""


def draw_sweep_of(key: SweptKey, swept: Sequence[SweptRuns], *, is_classifier: bool) -> Picture:
    """Draw what was measured over the values of *key*.

    Each set of devices has a column of panels, or several where further keys are swept: one for
    each combination of their values.
    """
    titles = ["loss", "accuracy (%)"] if is_classifier else ["loss"]
    rows = [_lines(key, swept, kind) for kind in titles]
    names = list(rows[0])
    methods = list(dict.fromkeys(method for lines in rows[0].values() for method in lines))
    figure, panels = make_panels(len(titles), len(names), sharey="row", sharex=True)
    for row, lines, title in zip(panels, rows, titles, strict=True):
        row[0].set_ylabel(title)
        for axes, name in zip(row, names, strict=True):
            for method, places in lines[name].items():
                index = methods.index(method)
                _line(axes, key, places, method, (index, len(methods)))
            _scale(axes, key)
    for top, bottom, name in zip(panels[0], panels[-1], names, strict=True):
        top.set_title(name, fontsize="medium")
        bottom.set_xlabel(key.key)
    handles, labels = legend_entries(list(panels.flat))
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    caption = (
        "At the last evaluation, each method at its own learning rate for each value. Bars: 95 % "
        "interval over seeds, where there are several. Hollow: the rate is not settled."
    )
    return to_picture(f"sweep-{key.name}", f"Over {key.key}", caption, figure)


def _lines(key: SweptKey, swept: Sequence[SweptRuns], kind: str) -> Lines:
    lines: Lines = {}
    for point, cells in swept:
        value = next(value for other, value in point.values if other.key == key.key)
        others = [f"{other.name} {shown(v)}" for other, v in point.without(key.key)]
        tried = tried_rates(cells)
        for (method, devices), own in by_group(at_chosen_rates(cells)).items():
            name = ", ".join([f"{devices} devices", *others])
            found = estimate([_measured(cell, kind) for cell in own])
            place = _Place(value, found, not edge_of(tried[method, devices]))
            lines.setdefault(name, {}).setdefault(method, []).append(place)
    return lines


def _measured(cell: RunResult, kind: str) -> float:
    return cell.last.loss if kind == "loss" else score(cell.last, is_classifier=True)


def _line(
    axes: Axes, key: SweptKey, places: Sequence[_Place], method: str, order: tuple[int, int]
) -> None:
    """Draw the method that is of this number among so many."""
    index, steps_aside = order[0], order[0] - (order[1] - 1) / 2
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    shown_places = [place for place in places if math.isfinite(place.found.mean)]
    if not shown_places:
        return
    shown_places.sort(key=lambda place: _at(key, place.value))
    x = [_beside(key, _at(key, place.value), steps_aside) for place in shown_places]
    y = [place.found.mean for place in shown_places]
    half = [0.0 if p.found.high is None else p.found.high - p.found.mean for p in shown_places]
    style: dict[str, Any] = {"color": colour, "linewidth": 1.6, "label": method}
    axes.errorbar(x, y, yerr=half if any(half) else None, capsize=3.0, **style)
    for at, place in zip(x, shown_places, strict=True):
        fill = colour if place.is_settled else "white"
        ring: dict[str, Any] = {
            "markeredgecolor": colour,
            "markerfacecolor": fill,
            "markersize": 5.5,
        }
        ring |= {"marker": marker, "linestyle": "none", "zorder": 3}
        axes.plot([at], [place.found.mean], **ring)


def _at(key: SweptKey, value: Value) -> float:
    """Return the place of a value on the axis: itself, or its number among the values."""
    return float(value) if key.is_numeric else float(key.values.index(value))  # type: ignore[arg-type]


def _beside(key: SweptKey, at: float, steps: float) -> float:
    """Return a place so many small steps beside another."""
    places = [_at(key, value) for value in key.values]
    if _is_logarithmic(key):
        return at * float((max(places) / min(places)) ** (BESIDE * steps))
    return at + BESIDE * steps * (max(places) - min(places))


def _is_logarithmic(key: SweptKey) -> bool:
    places = [_at(key, value) for value in key.values]
    return key.is_numeric and min(places) > 0 and max(places) >= LOG_RATIO * min(places)


def _scale(axes: Axes, key: SweptKey) -> None:
    """Put a mark at every value; far apart ones stand on a logarithmic axis."""
    from matplotlib.ticker import NullLocator

    places = [_at(key, value) for value in key.values]
    if _is_logarithmic(key):
        axes.set_xscale("log")
    axes.set_xticks(places, [shown(value) for value in key.values])
    axes.xaxis.set_minor_locator(NullLocator())
