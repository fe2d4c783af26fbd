"""The summary of compared runs: a row for each method on each set of devices.

Pure: cells in, rows and a table out. `cells.py` says which runs count.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.config.scoring import SCORES
from coordinator.lab.comparison.cells import (
    RunResult,
    Spread,
    at_chosen_rates,
    by_group,
    score,
    spread,
)
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    mean,
    number,
    span,
    words,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One method on one set of devices, over all seeds."""

    method: str
    device_set: str
    rate: float
    rate_is_extreme: bool
    """Whether its rate is the lowest or the highest that was tried: others might do better."""
    samples: int
    before: Spread
    """Loss before training."""
    loss: Spread
    score: Spread
    """Perplexity, or accuracy in percent."""
    scores: dict[str, Spread]
    """Those of `evaluation.scores` at the end, by name."""
    modelled_s: Spread | None
    """Seconds to the target, over the runs that reached it; None if none did."""
    real_s: Spread | None
    num_reached: int
    bytes_up: float
    """Bytes sent and received for a sample."""
    bytes_down: float
    is_central: bool
    peak_bytes: tuple[float, float] | None
    """Predicted peak memory of the smallest and of the largest device; None without devices."""
    trained: tuple[int, int] | None
    notes: tuple[str, ...]


def make_rows(cells: Sequence[RunResult], target: float, *, is_classifier: bool) -> list[TableRow]:
    """Return a row for each method and device set, in the order of the cells."""
    tried: dict[tuple[str, str], set[float]] = {}
    for cell in cells:
        tried.setdefault((cell.method, cell.device_set), set()).add(cell.rate)
    return [
        _row(own, sorted(tried[group]), target, is_classifier=is_classifier)
        for group, own in by_group(at_chosen_rates(cells)).items()
    ]


def _row(
    own: list[RunResult], rates: list[float], target: float, *, is_classifier: bool
) -> TableRow:
    first = own[0]
    reached = [point for cell in own if (point := cell.reached(target)) is not None]
    return TableRow(
        method=first.method,
        device_set=first.device_set,
        rate=first.rate,
        rate_is_extreme=first.rate in (rates[0], rates[-1]),
        samples=round(max(cell.last.samples for cell in own)),
        before=spread(cell.points[0].loss for cell in own),
        loss=spread(cell.last.loss for cell in own),
        score=spread(score(cell.last, is_classifier=is_classifier) for cell in own),
        scores={
            name: spread(c.scores[name] for c in own)
            for name in first.scores
            if all(name in c.scores for c in own)
        },
        modelled_s=spread(p.modelled_s for p in reached) if reached else None,
        real_s=spread(p.real_s for p in reached) if reached else None,
        num_reached=len(reached),
        bytes_up=statistics.fmean(c.last.bytes_up / c.last.samples for c in own),
        bytes_down=statistics.fmean(c.last.bytes_down / c.last.samples for c in own),
        is_central=first.is_central,
        peak_bytes=_range(cell.peak_bytes for cell in own),
        trained=_range(cell.trained for cell in own),
        notes=tuple(dict.fromkeys(note for cell in own for note in cell.notes)),
    )


def _range(by_device: Iterable[Mapping[str, Any] | None]) -> tuple[Any, Any] | None:
    values = [value for each in by_device if each for value in each.values()]
    return (min(values), max(values)) if values else None


# ---- the table ----

NAMES = (Column("method", "method"), Column("devices", "devices"))


def main_table(rows: Sequence[TableRow], target: float, *, is_classifier: bool) -> ResultTable:
    """Return the table of all methods."""
    score_column = ("accuracy", "accuracy (%)") if is_classifier else ("perplexity", "perplexity")
    names = [name for name in SCORES if any(name in row.scores for row in rows)]
    columns = (
        *NAMES,
        Column("learning_rate", "learning rate"),
        Column("samples", "samples"),
        Column("loss_before", "loss before training"),
        Column("loss", "loss"),
        Column(*score_column),
        *(Column(name, SCORES[name].title) for name in names),
        Column("time_to_target_s", f"modelled time to loss {target:.4g} (s)"),
        Column("simulated_in_s", "simulated in (s)"),
        Column("bytes_up_per_sample", "up per sample (kB)"),
        Column("bytes_down_per_sample", "down per sample (kB)"),
        Column("device_peak_bytes", "device peak, predicted (MiB)"),
        Column("trained", "trained on a device"),
    )
    return ResultTable(
        name="table",
        title="Results",
        caption="Loss, and what it cost to get there.",
        columns=columns,
        rows=[_cells(row, names, is_classifier=is_classifier) for row in rows],
    )


def _cells(row: TableRow, names: Sequence[str], *, is_classifier: bool) -> list[Entry]:
    edge = " (not settled)" if row.rate_is_extreme else ""
    missed = row.loss.num_seeds - row.num_reached
    note = f"{missed} of {row.loss.num_seeds} not reached" if missed else ""
    note = note if row.num_reached else "not reached"
    return [
        words(row.method),
        words(row.device_set),
        Entry(f"{row.rate:g}{edge}", (("", row.rate),)),
        number(row.samples, 0),
        mean(row.before, 4),
        mean(row.loss, 4),
        mean(row.score, 2 if is_classifier else 3),
        *(mean(row.scores.get(n), SCORES[n].digits, 1 / SCORES[n].factor) for n in names),
        mean(row.modelled_s, 1, note=note),
        mean(row.real_s, 1, note=note),
        EMPTY if row.is_central else number(row.bytes_up, 1, 1e3),
        EMPTY if row.is_central else number(row.bytes_down, 1, 1e3),
        span(row.peak_bytes, 1, 2**20),
        span(row.trained, 0),
    ]
