"""Differences with intervals: unequal devices, mixed cuts, and parts of the method switched off.

    OMP_NUM_THREADS=1 python benchmarks/paired.py --out paired [--only mixed-cuts] [--report]

Devices, data and models of benchmarks/methods.py, more seeds, 1,000 pairs held out, one learning
rate for all. Runs are kept in OUT/EXPERIMENT/cells.jsonl and not run again; experiments may be run
by several processes at once. Two runs of one seed are a pair: the same shards, adapters and order.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import methods
from methods_experiments import (
    CUTS,
    EXPERIMENTS,
    NUM_MORE,
    SLOWED,
    SLOWER,
    Experiment,
    write_data,
)
from methods_report import HETERO, HOMO, Cells, chosen, interval
from pictures import draw_intervals
from report import header, kept_parser, save, table

from coordinator.lab.comparison.cells import Point
from coordinator.lab.comparison.statistics.estimate import Estimate, estimate
from edge_sdk.command import quiet_libraries

Pairs = Sequence[tuple[Point, Point]]
SEEDS = tuple(range(8))
RATE, ROUNDS = 2e-2, 8
BANKING_RATE, BANKING_ROUNDS = 5e-3, 20
OURS = "hsplitlora"

ALIKE = Experiment(
    "e2e",
    "stories",
    dict(CUTS),
    seeds=SEEDS,
    rates=(RATE,),
    rounds=ROUNDS,
    searches=False,
    dev="more",
)
UNEQUAL = replace(ALIKE, methods={OURS: (OURS, ["labels=server"])}, sets=(HOMO, HETERO))
AT_OWN_RATE = replace(
    ALIKE,
    methods={
        SLOWED: (OURS, ["labels=server", SLOWER]),
        OURS: (OURS, ["labels=server"]),
        "splitlora": ("splitlora", []),
    },
    rates=(1.4e-2, RATE, 2.8e-2, 4e-2),
)
PAIRED = {
    "mixed-cuts": ALIKE,
    "mixed-cuts-base": replace(ALIKE, model="base"),
    "mixed-cuts-banking": replace(
        ALIKE, data="banking", model="minilm", rates=(BANKING_RATE,), rounds=BANKING_ROUNDS
    ),
    "unequal-devices": UNEQUAL,
    "unequal-devices-base": replace(UNEQUAL, model="base"),
    "server-rate": AT_OWN_RATE,
    "server-rate-base": replace(AT_OWN_RATE, model="base"),
    "parts": replace(
        ALIKE,
        methods={
            OURS: (OURS, ["labels=server"]),
            "without IWI": (OURS, ["labels=server", "planning.importance_every=1000000"]),
            "without ARMSC": (
                None,
                [
                    "labels=server",
                    "planning.split=fixed",
                    "planning.ranks=fixed",
                    "aggregation=fedex",
                    "default.split=4",
                ],
            ),
            "without NAA": (
                None,
                [
                    "labels=server",
                    "planning.split=armsc",
                    "planning.ranks=rngwp",
                    "aggregation=svd",
                ],
            ),
        },
    ),
}

SETS = {"": "E2E, stories260K", "-base": "E2E, base model", "-banking": "Banking77, MiniLM"}
"""What is trained, by the ending of an experiment's name."""

HOW = f"""\
Five devices as in benchmarks/methods.py, at most {len(SEEDS)} seeds, one learning rate for all.
E2E: {ROUNDS} rounds of 5 steps, a rate of {RATE:g}, {NUM_MORE:,} pairs held out.
Banking77, 20 of its intents: {BANKING_ROUNDS} rounds, a rate of {BANKING_RATE:g}, 1,300 sentences
held out, of which 800 are its test file.
Of the server learning rate, which is 1 elsewhere: each method at the best on the first seed of the
rates {", ".join(f"{rate:g}" for rate in AT_OWN_RATE.rates)}.
Differences are paired by seed; in brackets their 95 % interval by Student's t; p is the exact
sign-flip test, not corrected for the number of rows; time is the modelled one, as a ratio.
Accuracy is that of a token, or of a sentence."""

SWITCHED = """\
IWI off: importance is never measured, all weights count alike. ARMSC off: one cut and one rank for
all, the largest that the weakest device holds. NAA off: each device gets the best approximation of
its own rank (`svd`) in place of the whole update. Without IWI the plans
and so the losses are the same: memory bounds the blocks that a device holds, and beside those the
largest rank fits on all weights but one, so that importance has next to nothing to choose."""


def paired(cells: Cells, ours: tuple[str, str], base: tuple[str, str]) -> Pairs:
    """The ends of two methods, each on a set of devices, by their common seeds."""
    before = {cell.seed: cell.last for cell in chosen(cells, *base)}
    return [(c.last, before[c.seed]) for c in chosen(cells, *ours) if c.seed in before]


def change(pairs: Pairs) -> Estimate:
    """By how many percent the loss differs."""
    return estimate([100 * (a.loss / b.loss - 1) for a, b in pairs])


def difference(name: str, pairs: Pairs) -> list[str]:
    """A row: by how much one end differs from another."""
    loss = change(pairs)
    points = estimate([100 * (a.accuracy - b.accuracy) for a, b in pairs])
    return [
        name,
        str(len(pairs)),
        f"{statistics.fmean(b.loss for _, b in pairs):.4f}",
        f"{statistics.fmean(a.loss for a, _ in pairs):.4f}",
        interval(loss, 2),
        interval(points, 2),
        "" if loss.p is None else f"{loss.p:.3f}",
        f"{statistics.fmean(a.modelled_s / b.modelled_s for a, b in pairs):.2f}",
    ]


def write_report(out: Path, options: argparse.Namespace) -> None:
    """Write every pair that has run."""
    compared = [
        ("mixed-cuts", "mixed cuts against equal cuts", ("mixed cuts", HETERO), "equal cuts"),
        ("unequal-devices", f"{OURS}: unequal against equal devices", (OURS, HETERO), OURS),
        *(
            ("parts", f"{name} against {OURS}", (name, HETERO), OURS)
            for name in PAIRED["parts"].methods
            if name != OURS
        ),
        ("server-rate", f"{SLOWED} against 1", (SLOWED, HETERO), OURS),
        ("server-rate", f"{OURS} against splitlora", (OURS, HETERO), "splitlora"),
        ("server-rate", f"{SLOWED} against splitlora", (SLOWED, HETERO), "splitlora"),
    ]
    rows: list[list[str]] = []
    panels: dict[str, list[tuple[str, Estimate | None]]] = {title: [] for title in SETS.values()}
    for experiment, what, ours, base in compared:
        kind = HOMO if experiment == "unequal-devices" else HETERO
        for ending, data in SETS.items():
            name = f"{experiment}{ending}"
            found = methods.load_cells(name, out) if name in PAIRED else None
            pairs = paired(found, ours, (base, kind)) if found else []
            panels[data].append((what, change(pairs) if pairs else None))
            if pairs:
                rows.append(difference(f"{what}: {data}", pairs))
    drawn = {data: found for data, found in panels.items() if any(one for _, one in found)}
    if drawn:
        draw_intervals("paired", drawn, "change of the loss (%)")
    heads = "what|pairs|loss before|loss|change (%)|accuracy, points|p of the loss|time"
    parts = [header("Paired differences", options), HOW, table(heads.split("|"), rows), SWITCHED]
    save("paired", "\n\n".join(parts))


def main() -> None:
    """Run what is missing; report what is there."""
    parser = kept_parser(__doc__, "paired", PAIRED)
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.ERROR)  # texts without an end are meant
    EXPERIMENTS.update(PAIRED)
    if not options.report:
        write_data(options.out / "data", smoke=False)
        for name in options.only or PAIRED:
            methods.run_experiment(name, options.out, smoke=False)
    write_report(options.out, options)


if __name__ == "__main__":
    main()
