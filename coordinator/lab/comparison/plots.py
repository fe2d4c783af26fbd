"""Pictures of compared runs as PNG: loss against cost, who held what, which weights matter.

The only file that imports matplotlib, which is an extra and drawn with its Agg backend: no window,
no global state. Knows no training and no HTML.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
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


class Picture(NamedTuple):
    """One PNG and what it shows."""

    name: str
    title: str
    caption: str
    png: bytes


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
    held = [cell for cell in _first_seeds(cells) if any(cell.held)]
    if held:
        pictures.append(_holdings(held))
    measured = [cell for cell in held if cell.importance]
    if measured:
        pictures.append(_heat_maps(measured[-1]))
    return pictures


def _first_seeds(cells: Sequence[RunResult]) -> list[RunResult]:
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
    figure, panels = make_panels(1, len(kinds), sharey=True, sharex=True)
    for axes, kind in zip(panels[0], kinds, strict=True):
        for index, method in enumerate(methods):
            own = [c for c in cells if (c.method, c.device_set) == (method, kind)]
            _line(axes, own, cost, index)
        axes.axhline(target, color="#666666", linewidth=0.9, linestyle=":", zorder=1)
        axes.set(title=f"{kind} devices", xlabel=cost.label)
    _scale(panels[0], cells, cost)
    panels[0][0].set_ylabel("loss on the evaluation data")
    handles, labels = _legend_entries(panels[0])
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    before = _mean([cell.points[0].loss for cell in cells])
    caption = (
        f"Mean over seeds; the band is from the lowest to the highest. Dotted: the target, "
        f"{target:.4g}. Not drawn: the loss before training, {before:.4g}."
    )
    return Picture(cost.name, cost.title, caption, to_png(figure))


def _line(axes: Axes, own: Sequence[RunResult], cost: Cost, index: int) -> None:
    """Draw one method; without traffic there is nothing to draw against bytes."""
    rows = list(zip(*(cell.points for cell in own), strict=False))
    if not rows or not any(cost.of(point) for point in rows[-1]):
        return
    # Before training the cost is 0, which a logarithmic axis does not have.
    rows = [row for row in rows if all(cost.of(point) > 0 for point in row)]
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
    """Fit the axis to the losses that training reached, not to those before it."""
    lowest = min(cell.best_loss for cell in cells)
    first = max(cell.points[min(1, len(cell.points) - 1)].loss for cell in cells)
    before = max(cell.points[0].loss for cell in cells)
    top = min(before, first + 0.15 * (first - lowest))
    ends = [end for cell in cells if (end := cost.of(cell.last)) > 0]
    for axes in panels:
        if top > lowest and math.isfinite(top):
            axes.set_ylim(lowest - 0.05 * (top - lowest), top)
        if ends and max(ends) > LOG_RATIO * min(ends):
            axes.set_xscale("log")


def _legend_entries(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
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
    handles, labels = _legend_entries(list(panels.flat))
    figure.legend(handles, labels, title="device", loc="outside right center", frameon=False)
    title = f"Split points and ranks over the rounds, {last} devices"
    caption = (
        "First seed. Equal values are drawn slightly apart. A device that is not in a panel "
        "cannot hold what the method asks of it."
    )
    return Picture("splits-ranks", title, caption, to_png(figure))


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
    return Picture("importance", title, caption, to_png(figure))


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


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
