"""What the values of swept keys change, as a table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from coordinator.lab.comparison.cells import (
    RunResult,
    at_chosen_rates,
    by_group,
    score,
    tried_rates,
)
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    number,
    words,
)
from coordinator.lab.comparison.search.grid import edge_of
from coordinator.lab.comparison.statistics.differences import interval
from coordinator.lab.comparison.statistics.estimate import estimate
from coordinator.lab.comparison.sweeps.grid import GridPoint, shown
from coordinator.lab.comparison.table import NAMES

MB = 1e6


class SweptRuns(NamedTuple):
    """The runs of one point of a grid."""

    point: GridPoint
    cells: Sequence[RunResult]


def sweep_table(swept: Sequence[SweptRuns], *, is_classifier: bool) -> ResultTable:
    """Return a row for each point, method and set of devices."""
    name, title = ("accuracy", "accuracy (%)") if is_classifier else ("perplexity", "perplexity")
    keys = [key for key, _ in swept[0].point.values]
    columns = (
        *NAMES,
        *(Column(key.key, key.name) for key in keys),
        Column("learning_rate", "learning rate"),
        Column("settled", "settled"),
        Column("seeds", "seeds"),
        Column("samples", "samples"),
        Column("loss", "loss"),
        Column(name, title),
        Column("time_s", "modelled time (s)"),
        Column("bytes", "traffic (MB)"),
    )
    rows = [
        _row(each, own, is_classifier=is_classifier)
        for each in swept
        for own in by_group(at_chosen_rates(each.cells)).values()
    ]
    return ResultTable(
        name="sweep",
        title="Results by value",
        caption="Loss and score of the last evaluation, in brackets the 95 % interval over seeds; "
        "time and traffic of the whole run, mean over seeds",
        columns=columns,
        rows=sorted(rows, key=lambda row: (row[0].text, row[1].text)),
    )


def _row(swept: SweptRuns, own: Sequence[RunResult], *, is_classifier: bool) -> list[Entry]:
    first = own[0]
    edge = edge_of(tried_rates(swept.cells)[first.method, first.device_set])
    scores = [score(cell.last, is_classifier=is_classifier) for cell in own]
    traffic = statistics.fmean(cell.last.traffic_bytes for cell in own)
    return [
        words(first.method),
        words(first.device_set),
        *(Entry(shown(value), (("", value),)) for _, value in swept.point.values),
        Entry(f"{first.rate:g}", (("", first.rate),)),
        Entry("no" if edge else "yes", (("", int(not edge)),)),
        number(len(own), 0),
        number(max(cell.last.samples for cell in own), 0),
        interval(estimate([cell.last.loss for cell in own]), 4),
        interval(estimate(scores), 2 if is_classifier else 3),
        number(statistics.fmean(cell.last.modelled_s for cell in own), 1),
        EMPTY if first.is_central else number(traffic, 3, MB),
    ]
