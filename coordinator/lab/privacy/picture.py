"""The picture of an audit: how much is recovered, split by split and codec by codec."""

from __future__ import annotations

from typing import Any

from coordinator.lab.comparison.plots import COLOURS, MARKERS, Picture, make_panels, to_png
from coordinator.lab.privacy.report import AuditReport
from coordinator.lab.privacy.score import KINDS


def draw(report: AuditReport) -> Picture:
    """Draw a panel for each kind of token, with a line for each codec."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    kinds = [kind for kind in KINDS if kind in report.baseline]
    figure, axes = make_panels(1, len(kinds), sharey=True)
    for panel, kind in zip(axes[0], kinds, strict=True):
        for index, codec in enumerate(report.codecs):
            _line(panel, report, codec, kind, index)
        known = report.baseline[kind].top1
        panel.axhline(known, color="#666666", linewidth=0.9, linestyle=":", label="frequency")
        if report.labels and kind == KINDS[1]:
            most = max(cell.found.top1 for cell in report.labels)
            style: dict[str, Any] = {"color": "#666666", "linewidth": 1.2, "linestyle": "--"}
            panel.axhline(most, label="gradients", **style)
        panel.set(title=kind, xlabel="blocks on the device", ylim=(0.0, 1.03))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0][0].set_ylabel("tokens recovered at once")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    title = "What hidden states tell of a text"
    caption = (
        f"{report.model}: the best of the attacks that were tried, {report.tokens:,} tokens, seed "
        f"{report.seed}. Dotted: who knows only how frequent tokens are. Dashed: targets from "
        "gradients, with labels: device, whatever the split."
    )
    return Picture("recovery", title, caption, to_png(figure))


def _line(panel: Any, report: AuditReport, codec: str, kind: str, index: int) -> None:
    best = {split: report.best(split, codec, kind) for split in report.splits}
    points = [(split, cell.found[kind].top1) for split, cell in best.items() if cell]
    style: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }
    panel.plot([x for x, _ in points], [y for _, y in points], label=codec, **style)
