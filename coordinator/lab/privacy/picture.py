"""The picture of an audit: how much each attack recovers, split by split, in many bits and few."""

from __future__ import annotations

from typing import Any

from coordinator.lab.comparison.plots import COLOURS, MARKERS, Picture, make_panels, to_png
from coordinator.lab.privacy.report import ATTACKS, AuditReport
from coordinator.lab.privacy.score import KINDS
from edge_sdk.protocol.codecs import CODECS, find


def draw(report: AuditReport) -> Picture:
    """Draw a panel for each kind of token, with a line for each attack and codec shown."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    kinds = [kind for kind in KINDS if kind in report.baseline]
    shown = _shown(report)
    figure, axes = make_panels(1, len(kinds), sharey=True)
    for panel, kind in zip(axes[0], kinds, strict=True):
        for index, attack in enumerate(ATTACKS):
            for codec, line in zip(shown, ("-", "--"), strict=False):
                _line(panel, report, (attack, codec), kind, {**_style(index), "linestyle": line})
        grey: dict[str, Any] = {"color": "#666666", "linewidth": 1.0}
        panel.axhline(report.baseline[kind].top1, label="frequency", linestyle=":", **grey)
        if report.labels and kind == KINDS[-1]:
            most = max(cell.found.top1 for cell in report.labels)
            panel.axhline(most, label="gradients", linestyle="-.", **grey)
        panel.set(title=kind, xlabel="blocks on the device", ylim=(-0.02, 1.05))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0][0].set_ylabel("tokens recovered at once")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    title = "What hidden states tell of a text"
    caption = (
        f"{report.model}: {report.tokens:,} tokens, seed {report.seed}; the codecs with most and "
        "with fewest bits. Frequency: who knows only how frequent tokens are. Gradients: targets "
        "with labels: device, whatever the split."
    )
    return Picture("recovery", title, caption, to_png(figure))


def _shown(report: AuditReport) -> list[str]:
    """Return the most exact codec, and the one with fewest bits where there are several."""
    plain = [codec for codec in report.codecs if codec in CODECS] or list(report.codecs)
    if len(plain) == 1:
        return plain
    return [plain[0], min(plain, key=lambda codec: find(codec).bytes_per_number)]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 4.5, "linewidth": 1.6}


def _line(
    panel: Any, report: AuditReport, which: tuple[str, str], kind: str, style: dict[str, Any]
) -> None:
    """Draw one attack on the states of one codec; nothing where it was not tried."""
    points = [
        (cell.split, cell.found[kind].top1)
        for cell in report.cells
        if (cell.attack, cell.codec) == which and cell.split and kind in cell.found
    ]
    if points:
        x, y = zip(*points, strict=True)
        panel.plot(x, y, label=", ".join(which), **style)
