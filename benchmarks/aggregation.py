"""Join 100 devices' adapters of a 7B model's weight: time, memory, error, rule by rule.

    python benchmarks/aggregation.py [--devices 100] [--size 4096]

Random factors, ranks 4 .. 64 in turn, unequal shares, one 4096 x 4096 weight (LLaMA-2-7B's q, k, v
and o). Each rule runs in a process of its own. `exact` starts from factors that are not zero, as in
every round but the first, so that its stack is twice as long. Targets: 60 s and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
from report import header, save, table

from coordinator.aggregation.rules import RULES, Contribution, Rule, Update
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.targets import Shape

RANKS = (4, 8, 16, 32, 64)
CASES = (
    ("exact", None),
    ("exact", 64),
    ("stack", None),
    ("svd", None),
    ("svd", 64),
    ("zeropad", None),
)


def contributions(num: int, size: int, *, is_first: bool) -> dict[str, Contribution]:
    """Random adapters of unequal ranks and shares."""
    generator = np.random.default_rng(0)
    shares = generator.uniform(0.5, 1.5, num)
    found = {}
    for i, share in enumerate(shares / shares.sum()):
        rank = RANKS[i % len(RANKS)]
        before = initial_pair("w", rank, Shape(size, size), seed=0)
        if not is_first:
            before = moved(before, generator)
        found[f"device-{i:03}"] = Contribution(share, 16.0 / rank, before, moved(before, generator))
    return found


def moved(pair: Pair, generator: np.random.Generator) -> Pair:
    """The factors after some training."""
    return Pair(*(f + 0.01 * generator.standard_normal(f.shape, np.float32) for f in pair))


def measure(name: str, cap: int | None, num: int, size: int) -> dict[str, float]:
    """Seconds and memory of one rule in this process."""
    rule: Rule = RULES[name]
    found = contributions(num, size, is_first=name != "exact")
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    update: Update = rule.join(found, Shape(size, size), cap)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = update.total or update.change
    assert result is not None
    return {
        "seconds": seconds,
        "gib": peak / 2**20,
        "floor_gib": floor / 2**20,
        "rank": result.rank,
        "cut": update.cut_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case >= 0:
        print(json.dumps(measure(*CASES[options.case], options.devices, options.size)))
        return
    rows = []
    for i, (name, cap) in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(i)]
        command += ["--devices", str(options.devices), "--size", str(options.size)]
        runs = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(options.repeats)
        ]
        seconds = [run["seconds"] for run in runs]
        last = runs[-1]
        rows.append(
            [
                name,
                cap or "-",
                f"{statistics.median(seconds):.1f} ({min(seconds):.1f} - {max(seconds):.1f})",
                f"{last['gib']:.2f}",
                last["rank"],
                f"{last['cut']:.1%}",
            ]
        )
        print(rows[-1], flush=True)
    total = sum(RANKS[i % len(RANKS)] for i in range(options.devices))
    text = [
        header("Aggregation of many devices", options),
        f"{options.devices} devices, sum of ranks {total}, one {options.size} x {options.size} "
        f"weight; median (range) of {options.repeats} processes. Memory is the process's peak, "
        "inputs included.",
        table(["rule", "rank cap", "seconds", "peak GiB", "rank of the result", "cut off"], rows),
    ]
    save("aggregation", "\n\n".join(text))


if __name__ == "__main__":
    main()
