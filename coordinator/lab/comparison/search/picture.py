"""The picture of a search: final loss over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coordinator.lab.comparison.cells import RunResult, tried_rates
from coordinator.lab.comparison.plots import (
    COLOURS,
    MARKERS,
    Picture,
    legend_entries,
    make_panels,
    to_picture,
)
from coordinator.lab.comparison.search.grid import best_rate, edge_of


def draw_search(cells: Sequence[RunResult]) -> Picture | None:
    """Draw a panel for each set of devices, with a line for each method; None for one rate each."""
    tried = tried_rates(cells)
    if all(len(losses) == 1 for losses in tried.values()):
        return None
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    kinds = list(dict.fromkeys(kind for _, kind in tried))
    methods = list(dict.fromkeys(method for method, _ in tried))
    figure, panels = make_panels(1, len(kinds), sharey=True, sharex=True)
    for (method, kind), losses in tried.items():
        axes, index = panels[0][kinds.index(kind)], methods.index(method)
        rates = sorted(rate for rate in losses if math.isfinite(losses[rate]))
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        values = [losses[rate] for rate in rates]
        axes.plot(rates, values, label=method, color=colour, marker=marker, markersize=4.5)
        best = best_rate(losses)
        if best in rates:
            fill = "none" if edge_of(losses) else colour
            ring = {"markeredgecolor": colour, "markerfacecolor": fill, "markersize": 9.0}
            axes.plot([best], [losses[best]], marker=marker, **ring)
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set(xscale="log", xlabel="learning rate", title=f"{kind} devices")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0][0].set_ylabel("final loss")
    handles, labels = legend_entries(panels[0])
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    caption = (
        "Final loss on the first seed. Large: the rate that the method keeps; hollow where it "
        "stands at an edge of what was tried. Runs that diverged are left out."
    )
    return to_picture("learning-rates", "Loss over the learning rate", caption, figure)
