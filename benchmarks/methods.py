"""The methods against each other: quality, time and what unequal devices cost each of them.

    OMP_NUM_THREADS=1 python benchmarks/methods.py --out methods [--only e2e banking-cuts] [--smoke]

Every run is a cell of `coordinator compare`, kept in OUT/EXPERIMENT/cells.jsonl and not run again;
experiments may be run by several processes at once, each with an --only of its own. What is there
is written to benchmarks/results/. Five devices of different boards have memory from 5 to 20 units,
of which the whole model with rank 8 takes 10; data is dealt out with Dirichlet(0.5), by label or
by length. Each method tries every learning rate of one grid on seed 0 and keeps its
best. Numbers are of small models on small data: see the head of the report.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from methods_experiments import (
    BOARDS,
    EXPERIMENTS,
    NUM_DEV,
    NUM_INTENTS,
    RANKS,
    SEEDS,
    SMOKE,
    UNIFORM_RANK,
    UNITS,
    WHOLE_UNITS,
    make_config,
    set_budgets,
    write_data,
)
from methods_report import (
    Cells,
    about,
    accuracies,
    degraded,
    gaps,
    importances,
    times,
)
from report import header, kept_parser, save

from coordinator.lab.comparison.cells import RunResult, cell_from_row
from edge_sdk.command import quiet_libraries

# ---- runs ----


def run_experiment(name: str, out: Path, *, smoke: bool) -> None:
    """Run what is missing of an experiment."""
    from coordinator.lab.comparison.config import load_compare, load_methods
    from coordinator.lab.comparison.run import compare
    from coordinator.lab.simulation.run import simulate

    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    config = make_config(EXPERIMENTS[name], out / "data", smoke=smoke)
    set_budgets(config, file)
    clock = Stopwatch(name)
    loaded = load_compare(file, env={})
    cells = compare(loaded, load_methods(loaded, file, env={}), folder, clock.told, simulate)
    (folder / "done.json").write_text(json.dumps([list(cell.key) for cell in cells]))


class Stopwatch:
    """Says how long each run has taken."""

    def __init__(self, name: str) -> None:
        self._name, self._last_s = name, time.monotonic()

    def told(self, text: str) -> None:
        """Print a line."""
        now_s = time.monotonic()
        print(f"{self._name}: {text} ({now_s - self._last_s:.0f} s)", flush=True)
        self._last_s = now_s


def load_cells(name: str, out: Path) -> list[RunResult]:
    """The cells of an experiment that has ended; of one that has not, none."""
    folder = out / name
    if not (folder / "done.json").is_file():
        return []
    lines = (folder / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    found = {cell.key: cell for cell in map(cell_from_row, map(json.loads, lines))}
    # To a method without devices all devices are alike: it has run once for both sets.
    alone = {(c.method, c.seed, c.rate): c for c in found.values() if c.peak_bytes is None}
    cells = []
    for method, kind, seed, rate in json.loads((folder / "done.json").read_text()):
        cell = found.get((method, kind, seed, rate)) or alone[method, seed, rate]
        cells.append(replace(cell, device_set=kind))
    return cells


# ---- the report ----

TITLES = {
    "e2e": "E2E, stories260K",
    "e2e-base": "E2E, the base model of examples/",
    "e2e-base-faster": "the same at a rate of 2e-2, one seed",
    "e2e-strong-server": "the same with a server of 284.8 TFLOPS",
}


def write_report(out: Path, options: argparse.Namespace) -> None:
    """Write everything that has ended."""
    cells = {name: found for name in EXPERIMENTS if (found := load_cells(name, out))}
    parts = [header("Methods on equal and on unequal devices", options), HOW]

    def add(title: str, name: str, make: Callable[[Cells], str]) -> None:
        if name in cells:
            parts.extend([f"## {title}", make(cells[name])])

    for name in ("e2e", "e2e-base", "e2e-base-faster"):
        ranks = cells.get("e2e-ranks", []) if name == "e2e" else []
        add(f"Equal and unequal devices: {TITLES[name]}", name, lambda c, r=ranks: degraded(c, r))
    add(
        "Mixed cut points: Banking77, MiniLM", "banking-cuts", lambda c: accuracies(c, "equal cuts")
    )
    add(
        "The same with three more seeds, at the rate that both had kept",
        "banking-cuts-more",
        lambda c: accuracies(c, "equal cuts"),
    )
    for name, title in TITLES.items():
        add(f"Time to target: {title}", name, times)
    add(
        "Unequal ranks, skewed labels: Banking77, MiniLM, whole model on each device",
        "banking-ranks",
        lambda c: accuracies(c, "zeropad"),
    )
    for name in ("e2e", "e2e-base", "e2e-base-faster"):
        add(f"Gap to centralised LoRA: {TITLES[name]}", name, gaps)
    for name in ("e2e-importance", "banking-importance"):
        add(f"Ranks by importance, uniform ranks of equal bytes: {name}", name, importances)
    parts.append("## What ran")
    for name, found in cells.items():
        what = f"{EXPERIMENTS[name].model} on {EXPERIMENTS[name].data}"
        parts.append(about(name, what, found))
    save("methods", "\n\n".join(parts))


BUDGETS = ", ".join(f"{b} {u:g}" for b, u in zip(BOARDS, UNITS, strict=True))
HOW = f"""\
Small models on small data, {len(SEEDS)} seeds where not said otherwise: mean and sample standard
deviation. Devices and units of memory for the model: {BUDGETS}; the whole model with rank
{max(RANKS)} on every weight takes {WHOLE_UNITS:g}. Homogeneous: five of the one in the middle.
Links 300 Mbit/s both ways, 5 ms; a server of 35.6 TFLOPS where not said otherwise; 30 % of every
peak is reached. The clock counts as if LLaMA-2-7B were trained: operations and bytes are scaled, so
times compare methods and are no forecast. ft and cenlora train on the server, and moving the data
there is free. hsplitlora and splitlora hand the labels to the server, as published. Data is dealt
out with Dirichlet(0.5): E2E by length, Banking77 by label. Every method tried the same learning
rates on seed 0 and kept its best, for each set of devices; where that was the edge of the grid, a
larger one might have been better still. E2E: 4,000 random pairs of at most 220 characters, the loss
of 150 others; Banking77: the first {NUM_INTENTS} of its 77 intents, accuracy on {NUM_DEV} sentences
held out of the training file. Ranks of equal bytes: as much predicted device memory as rank
{UNIFORM_RANK} on every weight takes, kept activations included, so not the same number of
parameters."""


def main() -> None:
    """Run what is asked for and missing; report what is there."""
    parser = kept_parser(__doc__, "methods", EXPERIMENTS)
    parser.add_argument("--smoke", action="store_true", help="tiny: does everything run?")
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.ERROR)  # texts without an end are meant
    write_data(options.out / "data", smoke=options.smoke)
    wanted = options.only or (SMOKE if options.smoke else EXPERIMENTS)
    for name in () if options.report else wanted:
        run_experiment(name, options.out, smoke=options.smoke)
    if not options.smoke:
        write_report(options.out, options)


if __name__ == "__main__":
    main()
