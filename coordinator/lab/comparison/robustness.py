"""What dropouts and stragglers do to a method: who is disturbed, and by how much it matters.

All methods meet the same devices, drawn by the seed from the configured ones. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordinator.lab.comparison.cells import RunResult, at_chosen_rates, score
from coordinator.lab.comparison.config import CompareSection, Disturbance
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    change,
    number,
    words,
)
from coordinator.lab.comparison.table import NAMES
from coordinator.lab.simulation.config import SimulationConfig

# One draw for each kind of disturbance, so that one does not move the other.
_STREAMS: dict[Disturbance, int] = {"dropouts": 1, "stragglers": 2}


def disturb(
    config: SimulationConfig, kind: Disturbance, wanted: CompareSection, seed: int
) -> tuple[SimulationConfig, tuple[str, ...]]:
    """Return a run whose devices, named singly, are disturbed, and the names of those that are."""
    draws = np.random.default_rng([seed, _STREAMS[kind]])
    devices = dict(config.simulation.devices)
    share = wanted.dropout_share if kind == "dropouts" else wanted.straggler_share
    count = min(max(1, round(share * len(devices))), max(1, len(devices) - 1))
    names = sorted(draws.choice(sorted(devices), size=count, replace=False).tolist())
    for name in names:
        if kind == "stragglers":
            devices[name] = replace(devices[name], slowdown=wanted.straggler_factor)
        elif len(devices) > 1:
            first, last = config.total_steps // 3, 2 * config.total_steps // 3
            step = max(1, int(draws.integers(first, last + 1)))
            devices[name] = replace(devices[name], leaves_after_step=step)
    return replace(config, simulation=replace(config.simulation, devices=devices)), tuple(names)


def robustness_table(
    cells: Sequence[RunResult], wanted: CompareSection, *, is_classifier: bool
) -> ResultTable | None:
    """Return how loss and time change with each disturbance; None where nothing was disturbed."""
    plain = {cell.key: cell for cell in at_chosen_rates(cells)}
    disturbed = [cell for cell in cells if cell.disturbance and cell.key in plain]
    if not disturbed:
        return None
    measure = ("accuracy", "accuracy (%)") if is_classifier else ("perplexity", "perplexity")
    columns = (
        *NAMES,
        Column("disturbed_by", "disturbed by"),
        Column("disturbed", "which devices"),
        Column("loss", "loss"),
        Column("loss_change", "\u0394 loss"),
        Column(f"{measure[0]}_change", f"\u0394 {measure[1]}"),
        Column("time_s", "modelled time (s)"),
        Column("time_change", "\u0394 time (%)"),
    )
    caption = (
        f"Each method with devices on seed {wanted.seeds[0]}, undisturbed and again: dropouts, "
        f"{wanted.dropout_share:.0%} of the devices, leave for good in the middle third of the "
        f"run; stragglers, {wanted.straggler_share:.0%}, compute and send "
        f"{wanted.straggler_factor:g} times slower than their profile says. \u0394 is the "
        "difference to the undisturbed run"
    )
    return ResultTable(
        name="robustness",
        title="Robustness to dropouts and stragglers",
        caption=caption,
        columns=columns,
        rows=[_row(cell, plain[cell.key], is_classifier=is_classifier) for cell in disturbed],
    )


def _row(cell: RunResult, plain: RunResult, *, is_classifier: bool) -> list[Entry]:
    ours, theirs = cell.last, plain.last
    scores = [score(point, is_classifier=is_classifier) for point in (ours, theirs)]
    longer = ours.modelled_s / theirs.modelled_s - 1 if theirs.modelled_s else None
    return [
        words(cell.method),
        words(cell.device_set),
        words(cell.disturbance),
        words(", ".join(cell.disturbed)) if cell.disturbed else EMPTY,
        number(ours.loss, 4),
        change(ours.loss - theirs.loss, 4),
        change(scores[0] - scores[1], 2 if is_classifier else 3),
        number(ours.modelled_s, 1),
        change(longer, 1, 0.01),
    ]
