"""Methods in the order of their loss, where that order means something. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from coordinator.lab.comparison.cells import RunResult, at_chosen_rates, by_group
from coordinator.lab.comparison.config import LOCAL
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    words,
)
from coordinator.lab.comparison.search.table import in_sentences
from coordinator.lab.comparison.statistics.differences import (
    against_reference,
    interval,
    p_entry,
)
from coordinator.lab.comparison.statistics.estimate import estimate
from coordinator.lab.comparison.statistics.measures import Measure
from coordinator.lab.comparison.table import NAMES

Runs = Sequence[RunResult]


def rank_table(
    cells: Runs, unsettled: Mapping[tuple[str, str], str], loss: Measure
) -> ResultTable | None:
    """Return the methods that share devices' data, the best first; None where these are not two.

    A set of devices whose best method stands at an edge of its learning rates has no ranking.

    Args:
        cells: All runs.
        unsettled: What is to be said of methods at an edge, by method and set of devices.
        loss: What they are ranked by.
    """
    ranked = [cell for cell in cells if not cell.is_central and cell.method != LOCAL]
    groups = by_group(at_chosen_rates(ranked))
    rows, refused = [], []
    for kind in dict.fromkeys(kind for _, kind in groups):
        own = [runs for (_, other), runs in groups.items() if other == kind]
        if len(own) < 2:
            continue
        own.sort(key=_mean_loss)
        winner = own[0][0].method
        if (winner, kind) in unsettled:
            refused.append(kind)
        rows += _rows(own, {m for m, k in unsettled if k == kind}, loss, kind in refused)
    if not rows:
        return None
    return ResultTable(
        name="ranking",
        title="Ranking",
        caption=_caption(refused, unsettled),
        columns=(
            *NAMES,
            Column("place", "place"),
            Column("loss", "loss"),
            Column("behind", "behind the first"),
            Column("behind_p", "p"),
            Column("settled", "learning rate settled"),
        ),
        rows=rows,
    )


def _mean_loss(own: Runs) -> float:
    loss = statistics.fmean(cell.last.loss for cell in own)
    return loss if math.isfinite(loss) else math.inf


def _rows(
    own: list[list[RunResult]], at_edge: set[str], loss: Measure, is_refused: bool
) -> list[list[Entry]]:
    winner = own[0][0].method
    cells = [cell for runs in own for cell in runs]
    behind = {d.method: d.by_measure[0] for d in against_reference(cells, winner, [loss])}
    rows = []
    for place, runs in enumerate(own, start=1):
        first, edge = runs[0], runs[0].method in at_edge
        gap = None if is_refused else behind.get(first.method)
        settled = Entry("no", (("", 0),)) if edge else Entry("yes", (("", 1),))
        rows.append(
            [
                words(first.method),
                words(first.device_set),
                EMPTY if is_refused else Entry(str(place), (("", place),)),
                interval(estimate([cell.last.loss for cell in runs]), loss.digits),
                EMPTY if gap is None else interval(gap, loss.digits, sign="+"),
                EMPTY if gap is None else p_entry(gap),
                settled,
            ]
        )
    if is_refused:  # the order of the rows must not be read as one
        rows.sort(key=lambda row: row[0].text)
    return rows


def _caption(refused: Sequence[str], unsettled: Mapping[tuple[str, str], str]) -> str:
    texts = [
        "Methods that share what devices learn, by their mean loss, with 95 % intervals over "
        "seeds, which one seed does not have; behind the first: paired by seed"
    ]
    if refused:
        texts.append(
            f"No places for the {' and '.join(refused)} devices: the best of them stands at an "
            "edge of the learning rates that it tried, and how far it leads is unknown"
        )
    if unsettled:
        texts.append(
            "A method whose learning rate is not settled may do better than its row says: "
            + "; ".join(in_sentences(unsettled))
        )
    return ". ".join(texts)
