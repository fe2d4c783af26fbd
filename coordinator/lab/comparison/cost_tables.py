"""Quality under a budget, cost to a target, what travelled: what a method is worth at its price.

The definitions are in docs/compare.md, "Three more tables". Pure: cells in, tables out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from coordinator.lab.comparison.cells import (
    Point,
    RunResult,
    at_chosen_rates,
    by_group,
    common_target,
    score,
    spread,
)
from coordinator.lab.comparison.config import CENTRALISED, BudgetConfig
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    mean,
    number,
    words,
)
from coordinator.lab.comparison.table import NAMES
from coordinator.lab.simulation.traffic import DOWN_KINDS, UP_KINDS

MB, KJ = 1e6, 1e3


class Resource(NamedTuple):
    """What a run may run out of."""

    name: str
    """Field of `compare.budgets`."""
    of: Callable[[Point], float]
    of_devices: bool
    """Whether only devices have it, so that a run without any has none."""
    unit: float
    """What one of `unit_name` is."""
    unit_name: str


RESOURCES = (
    Resource("bytes", lambda p: p.traffic_bytes, of_devices=True, unit=MB, unit_name="MB"),
    Resource("seconds", lambda p: p.modelled_s, of_devices=False, unit=1.0, unit_name="s"),
    Resource("joules", lambda p: p.energy_j, of_devices=True, unit=KJ, unit_name="kJ"),
)


# ---- the target ----


class Target(NamedTuple):
    """The loss that costs are measured to."""

    loss: float
    why: str
    """Where it comes from, as the end of a sentence."""


def find_target(cells: Sequence[RunResult], loss: float | None, gain: float) -> Target:
    """Return the loss to reach: *loss*, or the one that makes a share of the centralised gain.

    Args:
        cells: All runs.
        loss: What somebody wants it to be.
        gain: Share of what centralised adapters gain over the untrained model.
    """
    chosen = at_chosen_rates(cells)
    if loss is not None:
        return Target(loss, "as configured")
    central = [cell for cell in chosen if cell.method == CENTRALISED]
    if central:
        before = statistics.fmean(cell.points[0].loss for cell in central)
        best = statistics.fmean(cell.best_loss for cell in central)
        if best < before:
            why = f"{gain:.0%} of what {CENTRALISED} gains, from {before:.4g} to {best:.4g}"
            return Target(before - gain * (before - best), why)
    return Target(common_target(chosen), "the lowest that every run reached")


def target_table(cells: Sequence[RunResult], target: Target) -> ResultTable:
    """Return what each method spends until the target is reached."""
    columns = (
        *NAMES,
        Column("samples", "samples"),
        Column("time_s", "modelled time (s)"),
        Column("bytes", "traffic (MB)"),
        Column("energy_j", "energy of devices (kJ)"),
        Column("reached", "runs that reached it"),
    )
    caption = (
        f"What is spent until the loss is {target.loss:.4g} ({target.why}), on a straight line "
        "between two evaluations; mean over the seeds that reached it. Time and energy are modelled"
    )
    return ResultTable(
        name="cost-to-target",
        title="Cost to target",
        caption=caption,
        columns=columns,
        rows=[_target_row(own, target.loss) for own in by_group(at_chosen_rates(cells)).values()],
    )


def _target_row(own: Sequence[RunResult], loss: float) -> list[Entry]:
    first = own[0]
    reached = [point for cell in own if (point := cell.reached(loss)) is not None]

    def spent(of: Callable[[Point], float], digits: int, unit: float = 1.0) -> Entry:
        if not reached:
            return Entry("not reached")
        return mean(spread(of(point) for point in reached), digits, unit)

    return [
        words(first.method),
        words(first.device_set),
        spent(lambda p: p.samples, 0),
        spent(lambda p: p.modelled_s, 1),
        EMPTY if first.is_central else spent(lambda p: p.traffic_bytes, 3, MB),
        EMPTY if first.is_central else spent(lambda p: p.energy_j, 3, KJ),
        Entry(f"{len(reached)} of {len(own)}", (("", len(reached)), ("_of", len(own)))),
    ]


# ---- budgets ----


def budget_table(
    cells: Sequence[RunResult], wanted: BudgetConfig, *, is_classifier: bool
) -> ResultTable:
    """Return how good each method is when so many bytes, seconds or joules are spent."""
    chosen = at_chosen_rates(cells)
    budgets = [(each, _budget(chosen, each, wanted)) for each in RESOURCES]
    present = [(each, budget) for each, budget in budgets if budget is not None]
    name, title = ("accuracy", "accuracy (%)") if is_classifier else ("perplexity", "perplexity")
    columns = [*NAMES]
    for each, budget in present:
        at = f"at {budget / each.unit:,.4g} {each.unit_name}"
        columns += [
            Column(f"loss_at_{each.name}", f"loss {at}"),
            Column(f"{name}_at_{each.name}", f"{title} {at}"),
        ]
    least = "; the least that a method with devices spends in its whole run"
    given = [each.name for each in RESOURCES if getattr(wanted, each.name) is not None]
    how = f"; of them as configured: {', '.join(given)}" if given else ""
    caption = (
        "The last evaluation before the bytes and joules of all devices, or the modelled seconds, "
        f"are spent{least}{how}. A dash: the method has no devices that would spend it"
    )
    return ResultTable(
        name="quality-under-budget",
        title="Quality under a budget",
        caption=caption,
        columns=columns,
        rows=[
            _budget_row(own, present, is_classifier=is_classifier)
            for own in by_group(chosen).values()
        ],
    )


def _budget(cells: Sequence[RunResult], resource: Resource, wanted: BudgetConfig) -> float | None:
    given: float | None = getattr(wanted, resource.name)
    spent = [resource.of(c.last) for c in cells if not c.is_central and c.last.traffic_bytes > 0]
    return given or min((each for each in spent if each > 0), default=None)


def _budget_row(
    own: Sequence[RunResult], budgets: Iterable[tuple[Resource, float]], *, is_classifier: bool
) -> list[Entry]:
    first = own[0]
    row = [words(first.method), words(first.device_set)]
    for resource, budget in budgets:
        if first.is_central and resource.of_devices:
            row += [EMPTY, EMPTY]
            continue
        points = [within(cell, resource, budget) for cell in own]
        row.append(mean(spread(p.loss for p in points), 4))
        scores = spread(score(p, is_classifier=is_classifier) for p in points)
        row.append(mean(scores, 2 if is_classifier else 3))
    return row


def within(cell: RunResult, resource: Resource, budget: float) -> Point:
    """Return the last evaluation of a run at which *budget* was not overspent."""
    # What the cheapest run spends in all is everybody's budget: its sum may differ in the last bit.
    return [point for point in cell.points if resource.of(point) <= budget * (1 + 1e-9)][-1]


# ---- traffic ----


def traffic_table(cells: Sequence[RunResult]) -> ResultTable:
    """Return what the bytes of each method with devices were."""
    chosen = [cell for cell in at_chosen_rates(cells) if cell.traffic]
    ways = {"up": UP_KINDS, "down": DOWN_KINDS}
    columns = [*NAMES]
    for way, kinds in ways.items():
        columns += [
            Column(f"{way}_{kind.replace(' ', '_')}_bytes", f"{kind} {way} (MB)") for kind in kinds
        ]
        columns.append(Column(f"{way}_bytes", f"all {way} (MB)"))
    rows = []
    for (method, kind), own in by_group(chosen).items():
        row = [words(method), words(kind)]
        for way, kinds in ways.items():
            found = [(cell.traffic or {}).get(way, {}) for cell in own]
            row += [number(statistics.fmean(f.get(k, 0) for f in found), 3, MB) for k in kinds]
            row.append(number(statistics.fmean(sum(f.values()) for f in found), 3, MB))
        rows.append(row)
    caption = (
        "Bytes of all devices in the whole run, mean over seeds. Activations down and gradients up "
        "are those of labels that stay on devices; round starts carry adapters and residuals; "
        "blocks are what a new plan asks for; other: reports of steps"
    )
    return ResultTable(name="traffic", title="Traffic", caption=caption, columns=columns, rows=rows)
