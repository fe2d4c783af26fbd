"""Pictures of docs/results.md: drawn by the benchmarks, kept in docs/plots as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator.lab.comparison.plots import COLOURS, make_panels, to_svg
from coordinator.lab.comparison.statistics.estimate import Estimate

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
        place.axvline(0.0, color="#666666", linewidth=0.9, zorder=1)
        for at, (_, found) in enumerate(rows):
            if found is None:
                continue
            if found.low is None or found.high is None:
                place.plot([found.mean], [at], "o", color=COLOURS[0], markerfacecolor="none")
                continue
            ends = [[found.mean - found.low], [found.high - found.mean]]
            place.errorbar([found.mean], [at], xerr=ends, fmt="o", color=COLOURS[0], capsize=3.0)
        place.set_title(title, fontsize="medium")
        place.set_xlabel(unit)
    first = next(iter(panels.values()))
    axes[0][0].set_yticks(range(most), [label for label, _ in first])
    axes[0][0].set_ylim(most - 0.4, -0.6)
    keep(name, to_svg(figure))
