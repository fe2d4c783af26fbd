"""Paired differences: against a reference method, unequal devices to equal ones, mixed cuts to one.

Two runs are a pair where they have one seed: the same shards, initial adapters and order. What
differs between seeds for all alike is then no part of the difference. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordinator.lab.comparison.cells import RunResult, at_chosen_rates, by_group
from coordinator.lab.comparison.config import DeviceSet
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    number,
    words,
)
from coordinator.lab.comparison.statistics.estimate import Estimate, estimate
from coordinator.lab.comparison.statistics.measures import Measure
from coordinator.lab.comparison.table import NAMES


class Difference(NamedTuple):
    """How one group of runs differs from another."""

    method: str
    device_set: str
    by_measure: tuple[Estimate, ...]
    """A difference for each measure."""


HOW = (
    "Mean over the seeds that both have, paired by seed, each at its own learning rate; in "
    "brackets the 95 % interval by Student's t, which one seed does not have. p: share of all "
    "patterns of signs of the differences under which the mean would be as far from 0, two-sided, "
    "exact, and not corrected for the number of rows. With n seeds no p is below 2/2^n"
)


def against_reference(
    cells: Sequence[RunResult], reference: str, kinds: Sequence[Measure]
) -> list[Difference]:
    """Return how each method differs from *reference*, on each set of devices that both have."""
    groups = by_group(at_chosen_rates(cells))
    return [
        found
        for (method, kind), own in groups.items()
        if method != reference
        and (found := _paired(own, groups.get((reference, kind), []), kinds)) is not None
    ]


def between_sets(
    cells: Sequence[RunResult], ours: DeviceSet, theirs: DeviceSet, kinds: Sequence[Measure]
) -> list[Difference]:
    """Return how each method with devices differs between two sets of devices."""
    groups = by_group([cell for cell in at_chosen_rates(cells) if not cell.is_central])
    return [
        found
        for (method, kind), own in groups.items()
        if kind == ours
        and (found := _paired(own, groups.get((method, theirs), []), kinds)) is not None
    ]


def _paired(
    ours: Sequence[RunResult], theirs: Sequence[RunResult], kinds: Sequence[Measure]
) -> Difference | None:
    other = {cell.seed: cell for cell in theirs}
    pairs = [(cell, other[cell.seed]) for cell in ours if cell.seed in other]
    if not pairs:
        return None
    found = tuple(estimate([kind.difference(*pair) for pair in pairs]) for kind in kinds)
    return Difference(ours[0].method, ours[0].device_set, found)


# ---- tables ----


def reference_table(
    found: Sequence[Difference], reference: str, kinds: Sequence[Measure]
) -> ResultTable:
    """Return the table of all methods against one."""
    return _table(
        "differences",
        f"Differences to {reference}",
        f"Each method less {reference} on the same devices; below 0 is a lower loss. {HOW}",
        found,
        kinds,
    )


def heterogeneity_table(found: Sequence[Difference], kinds: Sequence[Measure]) -> ResultTable:
    """Return the table of unequal devices against equal ones."""
    return _table(
        "heterogeneity",
        "Cost of heterogeneity",
        f"Each method on the devices as they are, less the same on as many equal ones. {HOW}",
        found,
        kinds,
    )


def mixed_cuts_table(found: Sequence[Difference], kinds: Sequence[Measure]) -> ResultTable:
    """Return the table of mixed cuts against one cut."""
    return _table(
        "mixed-cuts",
        "Cost of mixed cuts",
        "Each method that cuts the model at different blocks, less the same method on the same "
        f"devices with all cuts where the shallowest one is. {HOW}",
        found,
        kinds,
    )


def _table(
    name: str, title: str, caption: str, found: Sequence[Difference], kinds: Sequence[Measure]
) -> ResultTable:
    columns = [*NAMES, Column("seeds", "seeds")]
    for kind in kinds:
        columns += [
            Column(f"{kind.key}_difference", f"\u0394 {kind.title}"),
            Column(f"{kind.key}_p", "p"),
        ]
    return ResultTable(
        name=name,
        title=title,
        caption=caption,
        columns=columns,
        rows=[_row(each, kinds) for each in found],
    )


def _row(found: Difference, kinds: Sequence[Measure]) -> list[Entry]:
    row = [words(found.method), words(found.device_set)]
    row.append(number(found.by_measure[0].num_seeds, 0))
    for kind, each in zip(kinds, found.by_measure, strict=True):
        row += [interval(each, kind.digits, kind.unit, sign="+"), p_entry(each)]
    return row


def interval(found: Estimate, digits: int, unit: float = 1.0, *, sign: str = "") -> Entry:
    """Return a mean with its interval as an entry; one seed has none."""
    raw = (("", found.mean), ("_low", found.low), ("_high", found.high))
    text = f"{found.mean / unit:{sign},.{digits}f}"
    if found.low is None or found.high is None:
        return Entry(text, raw)
    low, high = (f"{end / unit:{sign},.{digits}f}" for end in (found.low, found.high))
    return Entry(f"{text} [{low}, {high}]", raw)


def p_entry(found: Estimate) -> Entry:
    """Return the p of a difference as an entry."""
    return EMPTY if found.p is None else Entry(f"{found.p:.2g}", (("", found.p),))
