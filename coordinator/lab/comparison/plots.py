"""Pictures of compared runs: loss against cost, who held what, which weights matter.

The only file that imports matplotlib, which is an extra and drawn with its Agg backend: no window,
no global state. Knows no training and no HTML.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coordinator.lab.comparison.cells import Point, RunResult, at_chosen_rates
from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
PANEL_INCHES = (4.6, 3.4)
DPI = 110
# Beyond this ratio of the slowest to the fastest, a linear axis hides the fast ones.
LOG_RATIO = 8.0
MAX_HEAT_MAPS = 4
# Losses after the first steps get panels of their own where they are less than this share of all.
CLOSE_UP_SHARE = 0.6
CLOSE_UP_INCHES = 2.6


class Picture(NamedTuple):
    """One picture and what it shows."""

    name: str
    title: str
    caption: str
    png: bytes
    vectors: tuple[tuple[str, bytes], ...] = ()
    """The same for print, by the ending of the file: SVG and PDF."""

    def write(self, folder: Path) -> None:
        """Write it to files of its name."""
        for kind, data in (("png", self.png), *self.vectors):
            (folder / f"{self.name}.{kind}").write_bytes(data)


class Cost(NamedTuple):
    """A quantity that loss is drawn against."""

    name: str
    title: str
    label: str
    of: Callable[[Point], float]


COSTS = (
    Cost("loss-samples", "Loss against samples", "samples trained on", lambda p: p.samples),
    Cost("loss-time", "Loss against modelled time", "modelled time (s)", lambda p: p.modelled_s),
    Cost(
        "loss-bytes",
        "Loss against traffic",
        "sent and received by all devices (MB)",
        lambda p: (p.bytes_up + p.bytes_down) / 1e6,
    ),
)


HELD = {"split": "blocks on the device", "rank": "mean rank of its weights"}


def require_matplotlib() -> None:
    """Fail before hours of training where there could be no plots.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "pictures need matplotlib, which is missing: pip install 'edgesplit[coordinator]'"
        ) from error


def draw(cells: Sequence[RunResult], target: float) -> list[Picture]:
    """Draw everything that *cells* have data for, each method at its own learning rate."""
    chosen = at_chosen_rates(cells)
    return [*(draw_losses(chosen, cost, target) for cost in COSTS), *draw_plans(chosen)]


def draw_plans(cells: Sequence[RunResult]) -> list[Picture]:
    """Draw split points and ranks over the rounds, and importance, where *cells* have them."""
    pictures = []
    held = [cell for cell in first_seeds(cells) if any(cell.held)]
    if held:
        pictures.append(_holdings(held))
    measured = [cell for cell in held if cell.importance]
    if measured:
        pictures.append(_heat_maps(measured[-1]))
    return pictures


def first_seeds(cells: Sequence[RunResult]) -> list[RunResult]:
    """Return one run of each method and device set."""
    first: dict[tuple[str, str], RunResult] = {}
    for cell in cells:
        first.setdefault((cell.method, cell.device_set), cell)
    return list(first.values())


# ---- loss ----


def draw_losses(cells: Sequence[RunResult], cost: Cost, target: float) -> Picture:
    """Draw a panel for each set of devices, with a line for each method."""
    kinds = list(dict.fromkeys(cell.device_set for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    spans = _spans(cells)
    shape: dict[str, Any] = {"height": CLOSE_UP_INCHES} if len(spans) > 1 else {}
    figure, panels = make_panels(len(spans), len(kinds), sharey="row", sharex=True, **shape)
    for row, span, what in zip(panels, spans, ("loss", "loss, close up"), strict=False):
        row[0].set_ylabel(what)
        for axes, kind in zip(row, kinds, strict=True):
            for index, method in enumerate(methods):
                own = [c for c in cells if (c.method, c.device_set) == (method, kind)]
                _line(axes, own, cost, index)
            axes.axhline(target, color="#666666", linewidth=0.9, linestyle=":", zorder=1)
            axes.set_ylim(*span)
    for top, bottom, kind in zip(panels[0], panels[-1], kinds, strict=True):
        top.set_title(f"{kind} devices")
        bottom.set_xlabel(cost.label)
    _scale(list(panels.flat), cells, cost)
    handles, labels = legend_entries(panels[0])
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    before = _mean([cell.points[0].loss for cell in cells])
    caption = (
        f"On the evaluation data, mean over seeds; the band is from the lowest to the highest. "
        f"Dotted: the target, {target:.4g}. Lines begin before training, at {before:.4g}."
        + (" Below: the same, without that beginning." if len(spans) > 1 else "")
    )
    return to_picture(cost.name, cost.title, caption, figure)


def _spans(cells: Sequence[RunResult]) -> list[tuple[float, float]]:
    """Return the range of the losses, and of those after the first steps where that is narrow."""
    lowest = min(cell.best_loss for cell in cells)
    first = max(cell.points[min(1, len(cell.points) - 1)].loss for cell in cells)
    before = max(cell.points[0].loss for cell in cells)
    ends = [top for top in (before, first) if math.isfinite(top) and top > lowest]
    is_narrow = len(ends) > 1 and first - lowest < CLOSE_UP_SHARE * (before - lowest)
    return [
        (lowest - 0.05 * (top - lowest), top + 0.08 * (top - lowest))
        for top in (ends if is_narrow else [max(ends, default=lowest + 1.0)])
    ]


def _line(axes: Axes, own: Sequence[RunResult], cost: Cost, index: int) -> None:
    """Draw one method; without traffic there is nothing to draw against bytes."""
    rows = list(zip(*(cell.points for cell in own), strict=False))
    if not rows or not any(cost.of(point) for point in rows[-1]):
        return
    x = [_mean([cost.of(point) for point in row]) for row in rows]
    y = [_mean([point.loss for point in row]) for row in rows]
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    every = max(1, len(x) // 8)
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5}
    axes.plot(x, y, label=own[0].method, linewidth=1.6, markevery=every, **style)
    if len(own) > 1:
        low = [min(point.loss for point in row) for row in rows]
        high = [max(point.loss for point in row) for row in rows]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _scale(panels: Sequence[Axes], cells: Sequence[RunResult], cost: Cost) -> None:
    """Choose an axis on which the cheap methods can be seen, too."""
    ends = [end for cell in cells if (end := cost.of(cell.last)) > 0]
    if not ends or max(ends) <= LOG_RATIO * min(ends):
        return
    positive = [cost.of(p) for cell in cells for p in cell.points if cost.of(p) > 0]
    for axes in panels:
        # Linear up to the first evaluation: a logarithmic axis has no place for what was before.
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.set_xlim(left=0.0)


def legend_entries(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """List each method once, also where a panel lacks it."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return list(handles.values()), list(handles)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- splits and ranks ----


def _holdings(cells: Sequence[RunResult]) -> Picture:
    """Draw a row for each method: blocks and mean rank of each device, round by round."""
    last = cells[-1].device_set
    shown = [cell for cell in cells if cell.device_set == last]
    figure, panels = make_panels(len(shown), 2, sharex="col", sharey="col", height=1.9)
    devices = sorted({device for cell in shown for device in cell.held[-1]})
    for column, (field, title) in enumerate(HELD.items()):
        most = max(getattr(h, field) for c in shown for held in c.held for h in held.values())
        for axes, cell in zip(panels[:, column], shown, strict=True):
            for index, device in enumerate(devices):
                # Equal lines lie side by side instead of hiding each other.
                shift = 0.02 * most * (index - (len(devices) - 1) / 2)
                _steps(axes, cell, device, field, shift, COLOURS[index % len(COLOURS)])
            axes.set_ylim(0, 1.2 * most)
        panels[0][column].set_title(title)
        panels[-1][column].set_xlabel("round")
    for axes, cell in zip(panels[:, 0], shown, strict=True):
        axes.set_ylabel(cell.method)
    handles, labels = legend_entries(list(panels.flat))
    figure.legend(handles, labels, title="device", loc="outside right center", frameon=False)
    title = f"Split points and ranks over the rounds, {last} devices"
    caption = (
        "First seed. Equal values are drawn slightly apart. A device that is not in a panel "
        "cannot hold what the method asks of it."
    )
    return to_picture("splits-ranks", title, caption, figure)


def _steps(axes: Axes, cell: RunResult, device: str, field: str, shift: float, colour: str) -> None:
    """Return what one device held in each round in which it took part."""
    from matplotlib.ticker import MaxNLocator

    holdings = [(n, held[device]) for n, held in enumerate(cell.held, start=1) if device in held]
    rounds = [number for number, _ in holdings]
    values = [getattr(held, field) + shift for _, held in holdings]
    style: dict[str, Any] = {"drawstyle": "steps-mid", "linewidth": 1.6, "marker": "."}
    axes.plot(rounds, values, color=colour, label=device, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


# ---- importance ----


def _heat_maps(cell: RunResult) -> Picture:
    """Draw blocks by kinds of weight, at some of the rounds."""
    rounds = _spread_out(cell.importance, MAX_HEAT_MAPS)
    tables = [_by_block(values) for _, values in rounds]
    kinds = list(dict.fromkeys(kind for _, kind in tables[0]))
    num_blocks = 1 + max(block for block, _ in tables[0])
    highest = max(max(table.values()) for table in tables)
    width = max(2.6, 1.2 + 0.38 * len(kinds))
    figure, panels = make_panels(1, len(rounds), sharey=True, width=width)
    for axes, (round_, _), table in zip(panels[0], rounds, tables, strict=True):
        grid = [
            [table.get((block, kind), math.nan) for kind in kinds] for block in range(num_blocks)
        ]
        image = axes.imshow(grid, cmap="viridis", vmin=0.0, vmax=highest, aspect="auto")
        axes.set(title=f"round {round_}", yticks=range(num_blocks))
        axes.grid(visible=False)
        axes.set_xticks(range(len(kinds)), kinds, rotation=90)
    panels[0][0].set_ylabel("block")
    figure.colorbar(image, ax=list(panels[0]), label="share of all importance (%)")
    title = f"Importance of weights, {cell.method} on {cell.device_set} devices"
    caption = "First seed; the smoothed global importance that ranks are chosen by."
    return to_picture("importance", title, caption, figure)


def _spread_out(rows: Sequence[Any], most: int) -> list[Any]:
    """Return the first, the last, and evenly spaced ones in between."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _by_block(importance: dict[str, float]) -> dict[tuple[int, str], float]:
    """Return percent of the sum, by block and last part of the weight's name."""
    total = sum(importance.values()) or 1.0
    shares: dict[tuple[int, str], float] = {}
    for name, value in importance.items():
        parts = name.split(".")
        at = next(i for i, part in enumerate(parts) if part.isdigit())
        shares[int(parts[at]), ".".join(parts[at + 1 :][-2:])] = 100.0 * value / total
    return shares


# ---- figures ----


def make_panels(
    rows: int, columns: int, *, width: float = 0.0, height: float = 0.0, **shared: Any
) -> tuple[Figure, Any]:
    """Return an empty figure with room for a legend at its right, and its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width or PANEL_INCHES[0]) * columns + 1.4, (height or PANEL_INCHES[1]) * rows + 0.4
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in panels.flat:
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def to_picture(name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Return a figure as a picture with all of its files."""
    vectors = (("svg", to_svg(figure)), ("pdf", _saved(figure, "pdf", CreationDate=None)))
    return Picture(name, title, caption, to_png(figure), vectors)


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    return _saved(figure, "png")


def to_svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file; equal figures give equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "edgesplit"}):
        return _saved(figure, "svg", Date=None)


def _saved(figure: Figure, kind: str, **metadata: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata or None)
    return buffer.getvalue()
