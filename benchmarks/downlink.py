"""Bytes and accuracy where devices are given all, or a part of what they lack.

    OMP_NUM_THREADS=1 python benchmarks/downlink.py --out downlink [--seeds 0 1 2] [--short]
        [--only "exact, budget of 8, int8" ...]

The setup is that of `methods.py`, unequal ranks and skewed labels (experiment `banking-ranks`):
five devices of ranks 1, 2, 4, 8 and 16 hold a whole sentence encoder and 20 of Banking77's intents,
dealt out with Dirichlet(0.5); 12 rounds of 5 steps at the learning rate that all rules had kept
there. Two processes share the runs; those that have ended stay in OUT. Bytes are those of
RoundStart and AdapterUpload as they were on the wire, all devices together, the head included.
--short: 4 rounds of one seed.
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

NUM_PROCESSES = 2
RATE = 5e-3
SHORT_ROUNDS = 4
EXPERIMENT = EXPERIMENTS["banking-ranks"]


def _budget(rule: str, codec: str, rank: int | None = None) -> tuple[str, list[str]]:
    settings = [f"exchange.codec={codec}", "exchange.downlink=budget"]
    return rule, [*settings, *([] if rank is None else [f"exchange.rank={rank}"])]


METHODS: dict[str, tuple[str, list[str]]] = {
    "fedex, full": ("fedex", []),
    "fedex, budget, int8": _budget("fedex", "int8"),
    "fedex, budget of 8, int4": _budget("fedex", "int4", 8),
    "exact, full": ("exact", []),
    "exact, budget, int8": _budget("exact", "int8"),
    "exact, budget of 8, int4": _budget("exact", "int4", 8),
    "svd": ("svd", []),
    "zeropad": ("zeropad", []),
}
"""Rule and settings."""
MORE: dict[str, tuple[str, list[str]]] = {
    **{
        f"exact, full, {codec}": ("exact", [f"exchange.codec={codec}"])
        for codec in ("bfloat16", "int8", "int4")
    },
    "exact, budget, int4": _budget("exact", "int4"),
    **{f"exact, budget of {rank}, int8": _budget("exact", "int8", rank) for rank in (1, 2, 4, 8)},
    **{f"exact, budget of {rank}, int4": _budget("exact", "int4", rank) for rank in (1, 2, 4, 16)},
}
"""What is run where --only asks for it."""


def write_config(out: Path, *, is_short: bool) -> None:
    """Write the data and what `coordinator compare` would read."""
    write_data(out / "data", smoke=False)
    every = METHODS | MORE
    methods: dict[str, Any] = {
        name: (None, [*EXPERIMENT.methods[rule][1], *settings])
        for name, (rule, settings) in every.items()
    }
    config = make_config(replace(EXPERIMENT, methods=methods), out / "data", smoke=False)
    config["rounds"] = SHORT_ROUNDS if is_short else config["rounds"]
    set_budgets(config, out / "config.json")


def run_one(out: Path, name: str, seed: int) -> None:
    """Run a method with a seed, unless that is done, and keep what came of it."""
    from coordinator.lab.comparison.config import load_compare, load_methods
    from coordinator.lab.simulation.run import simulate
    from coordinator.results.watchers import Watchers

    file = _file(out, name, seed)
    if file.exists():
        return
    loaded = load_compare(out / "config.json", env={})
    run = load_methods(loaded, out / "config.json", env={})[name]
    training = replace(run.training, seed=seed, learning_rate=RATE)
    result = simulate(replace(run, training=training, runs=out / "runs", name=None), Watchers([]))
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


def _file(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def _downs(rounds: list[Any]) -> dict[str, int]:
    """Bytes that each device was sent."""
    found: dict[str, int] = {}
    for row in rounds:
        for device, clock in row.clock.get("devices", {}).items():
            found[device] = found.get(device, 0) + clock["bytes_down"]
    return found


def mean(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def rows_of(out: Path, seeds: list[int], names: list[str]) -> list[list[str]]:
    """One line a method: accuracy, its distance from `fedex`, bytes, lag."""
    found = {
        name: [json.loads(_file(out, name, seed).read_text("utf-8")) for seed in seeds]
        for name in names
    }
    base, svd = found["fedex, full"], sum(_total(cell) for cell in found["svd"])
    rows = []
    for name, cells in found.items():
        away = [c["accuracy"] - b["accuracy"] for c, b in zip(cells, base, strict=True)]
        rows.append(
            [
                name,
                mean([c["accuracy"] for c in cells], 2),
                mean(away, 2),
                mean([c["up"] / 1e6 for c in cells], 1),
                mean([c["down"] / 1e6 for c in cells], 1),
                f"{sum(_total(cell) for cell in cells) / svd:.2f}",
                f"{statistics.mean(max(c['lag']) for c in cells):.1%}",
                f"{statistics.mean(c['lag'][-1] for c in cells):.1%}",
            ]
        )
    return rows


def _total(cell: dict[str, Any]) -> float:
    return float(cell["up"] + cell["down"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[*METHODS, *MORE], default=list(METHODS))
    parser.add_argument("--process", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    seeds = options.seeds[:1] if options.short else options.seeds
    names = list(dict.fromkeys(["fedex, full", *options.only, "svd"]))  # of comparison
    if options.process is not None:
        jobs = [(name, seed) for name in names for seed in seeds]
        for name, seed in jobs[options.process :: NUM_PROCESSES]:
            run_one(options.out, name, seed)
        return
    write_config(options.out, is_short=options.short)
    command = [sys.executable, __file__, *sys.argv[1:], "--process"]
    processes = [subprocess.Popen([*command, str(n)]) for n in range(NUM_PROCESSES)]
    if failed := [code for process in processes if (code := process.wait())]:
        raise SystemExit(failed[0])
    heads = ["method", "dev accuracy (%)", "points above fedex, full", "MB up", "MB down"]
    heads += ["bytes, svd = 1", "most lag of a device", "at the end"]
    text = [
        header("What a device is given of the change", options),
        f"Mean and sample standard deviation over seeds {seeds}; {NUM_DEV} sentences held out.",
        table(heads, rows_of(options.out, seeds, names)),
    ]
    save("downlink", "\n\n".join(text))


if __name__ == "__main__":
    main()
