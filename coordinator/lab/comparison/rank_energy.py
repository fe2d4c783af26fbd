"""How the energy of dW is spread over its singular values, round by round: a picture and a table.

Where unequal ranks are joined by padding or cutting, the energy may collapse into the ranks that
every device has ("rank collapse", arXiv 2602.13486). `evaluation.rank_energy` records it.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.lab.comparison.cells import RunResult, at_chosen_rates
from coordinator.lab.comparison.plots import (
    Picture,
    first_seeds,
    legend_entries,
    make_panels,
    to_picture,
)
from coordinator.lab.comparison.result_table import EMPTY, Column, ResultTable, number, words
from coordinator.lab.comparison.table import NAMES

# More panels in a row than that are too small to be read.
MOST_COLUMNS = 4
PANEL_INCHES = (3.2, 2.8)
# Bands beyond this rank are one: they would be too thin to be told apart.
MOST_BANDS = 6


def _measured(cells: Sequence[RunResult]) -> list[RunResult]:
    return [cell for cell in first_seeds(at_chosen_rates(cells)) if cell.rank_energy]


def draw_energy(cells: Sequence[RunResult]) -> Picture | None:
    """Draw a panel for each method and set of devices; None where nothing was recorded."""
    shown = _measured(cells)
    if not shown:
        return None
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    most = max(len(shares) for cell in shown for _, shares in cell.rank_energy)
    num_bands = min(most, MOST_BANDS)
    columns = min(len(shown), MOST_COLUMNS)
    rows = -(-len(shown) // columns)
    width, height = PANEL_INCHES
    figure, panels = make_panels(rows, columns, sharey=True, width=width, height=height)
    colours = colormaps["viridis"]([at / max(1, num_bands - 1) for at in range(num_bands)])
    for axes, cell in zip(panels.flat, shown, strict=False):
        rounds = [round_ for round_, _ in cell.rank_energy]
        bands = zip(*(_bands(shares, num_bands) for _, shares in cell.rank_energy), strict=True)
        axes.stackplot(rounds, *bands, labels=_labels(num_bands, most), colors=colours)
        axes.set(title=f"{cell.method}\n{cell.device_set} devices", ylim=(0.0, 1.0))
        axes.title.set_fontsize("small")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_ylabel("share of the energy of dW")
    handles, labels = legend_entries([panels[0][0]])
    figure.legend(
        handles[::-1],
        labels[::-1],
        title="singular values",
        loc="outside right center",
        frameon=False,
    )
    caption = (
        "First seed. Energy: squared singular values of dW, all weights together, after each "
        "aggregation. The more is in the first ones, the fewer ranks do all the work."
    )
    return to_picture("rank-energy", "Energy of dW by rank over the rounds", caption, figure)


def _bands(shares: Sequence[float], count: int) -> list[float]:
    """Return what each further power of two adds; the last band has all that is left."""
    ends = [*shares, *[1.0] * count][: count - 1] + [1.0]
    return [end - before for before, end in zip([0.0, *ends], ends, strict=False)]


def _labels(count: int, most: int) -> list[str]:
    """Return which singular values are in each band."""
    firsts = [1, *(2**at + 1 for at in range(count - 1))]
    lasts: list[int | None] = [2**at for at in range(count)]
    if most > count:
        lasts[-1] = None
    return [
        f"{first} and further"
        if last is None
        else str(first)
        if first == last
        else f"{first} to {last}"
        for first, last in zip(firsts, lasts, strict=True)
    ]


def energy_table(cells: Sequence[RunResult]) -> ResultTable | None:
    """Return the shares after the last round; None where nothing was recorded."""
    shown = _measured(cells)
    if not shown:
        return None
    most = max(len(cell.rank_energy[-1][1]) for cell in shown)
    ranks = [2**at for at in range(most)]
    rows = []
    for cell in shown:
        round_, shares = cell.rank_energy[-1]
        known = [number(share, 2, 0.01) for share in shares]
        row = [words(cell.method), words(cell.device_set), number(round_, 0), *known]
        rows.append([*row, *[EMPTY] * (most - len(shares))])
    return ResultTable(
        name="rank-energy",
        title="Energy of dW by rank",
        caption="Percent of the squared Frobenius norm of dW in the largest singular values of its "
        "weights after the last round, first seed. A dash: there are no further ones",
        columns=(
            *NAMES,
            Column("round", "round"),
            *(Column(f"within_{rank}", f"within {rank}") for rank in ranks),
        ),
        rows=rows,
    )
