"""Bytes and accuracy of `exact` where devices are given all, or a part of what they lack.

    OMP_NUM_THREADS=1 python benchmarks/downlink.py --out downlink [--seeds 0 1 2] [--short]

The setup is that of `methods.py`, unequal ranks and skewed labels (experiment `banking-ranks`):
five devices of ranks 1, 2, 4, 8 and 16 hold a whole sentence encoder and 20 of Banking77's intents,
dealt out with Dirichlet(0.5); 12 rounds of 5 steps at the learning rate that all rules had kept
there. Seeds run at the same time, one to a core; runs that have ended stay in OUT. Bytes are those
of RoundStart and AdapterUpload as they were on the wire, all devices together, the head included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from methods_experiments import EXPERIMENTS, NUM_DEV, make_config, set_budgets, write_data
from report import header, save, table

from edge_sdk.command import quiet_libraries

RATE = 5e-3
RANKS = EXPERIMENTS["banking-ranks"].methods
BUDGET = ["exchange.codec=int8", "exchange.downlink=budget"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "exact, full": ("exact", []),
    "exact, full, int8": ("exact", ["exchange.codec=int8"]),
    "exact, budget, int8": ("exact", BUDGET),
    "exact, budget of 8, int8": ("exact", [*BUDGET, "exchange.rank=8"]),
    "exact, budget of 4, int8": ("exact", [*BUDGET, "exchange.rank=4"]),
    "exact, budget of 2, int8": ("exact", [*BUDGET, "exchange.rank=2"]),
    "svd": ("svd", []),
    "zeropad": ("zeropad", []),
}
SHORT = ("exact, full", "exact, budget, int8", "svd")


def run_seed(seed: int, out: Path, names: list[str], rounds: int | None) -> None:
    """Run what is missing of a seed, and keep what came of it."""
    from coordinator.lab.comparison.config import load_compare, load_methods
    from coordinator.lab.simulation.run import simulate
    from coordinator.results.watchers import Watchers

    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    experiment = EXPERIMENTS["banking-ranks"]
    methods = {name: (None, [*(RANKS[METHODS[name][0]][1]), *METHODS[name][1]]) for name in METHODS}
    config = make_config(replace(experiment, methods=methods), out / "data", smoke=False)
    config["rounds"] = rounds or config["rounds"]
    set_budgets(config, folder / "config.json")
    loaded = load_compare(folder / "config.json", env={})
    runs = load_methods(loaded, folder / "config.json", env={})
    for name in names:
        file = folder / f"{_slug(name)}.json"
        if file.exists():
            continue
        run = runs[name]
        training = replace(run.training, seed=seed, learning_rate=RATE)
        result = simulate(
            replace(run, training=training, runs=folder / "runs", name=None), Watchers([])
        )
        last = result.rounds[-1]
        found = {
            "accuracy": 100 * (last.accuracy or 0.0),
            "up": last.bytes_up,
            "down": last.bytes_down,
            "down_by_device": _downs(result.rounds),
            "lag": [row.metrics.get("lag", 0.0) for row in result.rounds[1:]],
            "rank": last.metrics["rank"],
        }
        file.write_text(json.dumps(found), encoding="utf-8")
        print(
            f"seed {seed}: {name}: {found['accuracy']:.1f} %, lag {found['lag'][-1]:.3f}, "
            f"{found['up'] / 1e6:.1f} + {found['down'] / 1e6:.1f} MB",
            flush=True,
        )


def _downs(rounds: list[Any]) -> dict[str, int]:
    """Bytes that each device was sent."""
    found: dict[str, int] = {}
    for row in rounds:
        for device, clock in row.clock.get("devices", {}).items():
            found[device] = found.get(device, 0) + clock["bytes_down"]
    return found


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def mean(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def rows_of(out: Path, seeds: list[int], names: list[str]) -> list[list[str]]:
    """One line a method: accuracy, its distance from `exact`, bytes, lag."""
    found = {
        name: [json.loads((out / f"seed-{s}" / f"{_slug(name)}.json").read_text()) for s in seeds]
        for name in names
    }
    base, svd = found["exact, full"], found["svd"]
    rows = []
    for name, cells in found.items():
        away = [c["accuracy"] - b["accuracy"] for c, b in zip(cells, base, strict=True)]
        total = sum(c["up"] + c["down"] for c in cells)
        rows.append(
            [
                name,
                mean([c["accuracy"] for c in cells], 2),
                mean(away, 2),
                mean([c["up"] / 1e6 for c in cells], 1),
                mean([c["down"] / 1e6 for c in cells], 1),
                f"{total / sum(c['up'] + c['down'] for c in svd):.2f}",
                f"{statistics.mean(max(c['lag']) for c in cells):.1%}",
                f"{statistics.mean(c['lag'][-1] for c in cells):.1%}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--seed", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    seeds = options.seeds[:1] if options.short else options.seeds
    names = options.only or list(SHORT if options.short else METHODS)
    rounds = 4 if options.short else None
    if options.seed is not None:
        run_seed(options.seed, options.out, names, rounds)
        return
    write_data(options.out / "data", smoke=False)
    passed = [sys.executable, __file__, *sys.argv[1:]]
    waiting = [[*passed, "--seed", str(seed)] for seed in seeds]
    while waiting:
        for process in [subprocess.Popen(command) for command in waiting[:2]]:
            if process.wait():
                raise SystemExit(process.returncode)
        waiting = waiting[2:]
    heads = ["method", "dev accuracy (%)", "points above exact, full", "MB up", "MB down"]
    heads += ["bytes, svd = 1", "most lag of a device", "at the end"]
    text = [
        header("What a device is given of the change", options),
        f"Mean and sample standard deviation over seeds {seeds}; {NUM_DEV} sentences held out.",
        table(heads, rows_of(options.out, seeds, names)),
    ]
    save("downlink", "\n\n".join(text))


if __name__ == "__main__":
    main()
