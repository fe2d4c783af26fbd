"""The picture of differences: a point and a 95 % interval for each, beside a line at 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coordinator.lab.comparison.plots import COLOURS, Picture, make_panels, to_picture
from coordinator.lab.comparison.statistics.differences import Difference
from coordinator.lab.comparison.statistics.estimate import Estimate
from coordinator.lab.comparison.statistics.measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_INCHES = 0.32


def draw_differences(
    panels: Mapping[str, Sequence[Difference]], kinds: Sequence[Measure]
) -> Picture | None:
    """Draw a row of panels for each table of differences, a panel for each measure.

    Args:
        panels: Differences by what they are.
        kinds: What they are differences of.
    """
    shown = {title: found for title, found in panels.items() if found}
    if not shown:
        return None
    most = max(len(found) for found in shown.values())
    height = 1.1 + ROW_INCHES * most
    figure, axes = make_panels(len(shown), len(kinds), height=height)
    for row, (title, found) in zip(axes, shown.items(), strict=True):
        for index, (place, kind) in enumerate(zip(row, kinds, strict=True)):
            _panel(place, [d.by_measure[index] for d in found], kind)
            place.set_ylim(len(found) - 0.4, -0.6)
            names = [f"{d.method}, {d.device_set}" for d in found] if index == 0 else []
            place.set_yticks(range(len(found)), names or [""] * len(found))
        row[0].set_title(title, loc="left", fontsize="medium")
    caption = (
        "Points: mean over seeds; bars: 95 % interval, paired by seed; hollow without a bar: one "
        "seed. What crosses the line may be no difference."
    )
    return to_picture("differences", "Differences", caption, figure)


def _panel(axes: Axes, found: Sequence[Estimate], kind: Measure) -> None:
    draw_estimates(axes, found, kind.unit)
    axes.set_xlabel(f"\u0394 {kind.title}")


def draw_estimates(axes: Axes, found: Sequence[Estimate | None], unit: float = 1.0) -> None:
    """Draw a mean and its 95 % interval a row, beside a line at 0; hollow without an interval.

    Args:
        axes: Where.
        found: From the first row on; None: that row stays empty.
        unit: What the axis counts in.
    """
    axes.axvline(0.0, color="#666666", linewidth=0.9, zorder=1)
    for at, each in enumerate(found):
        if each is None:
            continue
        mean = each.mean / unit
        if each.low is None or each.high is None:
            axes.plot([mean], [at], "o", color=COLOURS[0], markerfacecolor="none")
            continue
        ends = [[mean - each.low / unit], [each.high / unit - mean]]
        axes.errorbar([mean], [at], xerr=ends, fmt="o", color=COLOURS[0], capsize=3.0)
