"""Pictures of docs/results.md: drawn by the benchmarks, kept in docs/plots as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator.lab.comparison.plots import make_panels, to_svg
from coordinator.lab.comparison.statistics.estimate import Estimate
from coordinator.lab.comparison.statistics.picture import draw_estimates

PLOTS = Path(__file__).parents[1] / "docs" / "plots"
Named = Sequence[tuple[str, Estimate | None]]


def keep(name: str, svg: bytes) -> None:
    """Put a picture where the pages are; equal ones give equal files."""
    PLOTS.mkdir(exist_ok=True)
    (PLOTS / f"{name}.svg").write_bytes(svg)


def draw_intervals(name: str, panels: Mapping[str, Named], unit: str) -> None:
    """Draw a panel for each title: a mean and its 95 % interval a row, beside a line at 0.

    What has one seed is hollow and has no bar. The panels have the same rows; None: not run.
    """
    most = max(len(rows) for rows in panels.values())
    width = 3.4 if len(panels) > 1 else 5.0
    figure, axes = make_panels(1, len(panels), sharey=True, width=width, height=0.9 + 0.3 * most)
    for place, (title, rows) in zip(axes[0], panels.items(), strict=True):
        draw_estimates(place, [found for _, found in rows])
        place.set_title(title, fontsize="medium")
        place.set_xlabel(unit)
    first = next(iter(panels.values()))
    axes[0][0].set_yticks(range(most), [label for label, _ in first])
    axes[0][0].set_ylim(most - 0.4, -0.6)
    keep(name, to_svg(figure))
