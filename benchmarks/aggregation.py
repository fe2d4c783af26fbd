"""Join 100 devices' adapters of a 7B model's weight: time, memory, error, rule by rule.

    python benchmarks/aggregation.py [--devices 100] [--size 4096] [--only fedex exact]

Random factors, ranks 4 .. 64 in turn, unequal shares, one 4096 x 4096 weight (LLaMA-2-7B's q, k, v
and o). Each rule runs in a process of its own. The second round is measured, which begins with what
the first has made, as every one but that does. Targets: 60 s and 4 GB.
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

from coordinator.aggregation.ledger import Ledger, Report
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.targets import LoraConfig, ModelFacts, Shape
from edge_sdk.model.layout import Layout

RANKS = (4, 8, 16, 32, 64)
CASES = (
    ("fedex", None),
    ("fedex", 64),
    ("exact", None),
    ("exact", 64),
    ("stack", None),
    ("svd", None),
    ("svd", 64),
    ("zeropad", None),
)


def moved(pair: Pair, generator: np.random.Generator) -> Pair:
    """The factors after some training."""
    return Pair(*(f + 0.01 * generator.standard_normal(f.shape, np.float32) for f in pair))


def measure(name: str, cap: int | None, num: int, size: int) -> dict[str, float]:
    """Seconds and memory of one rule in this process."""
    layout = Layout("h", 1, ("front",), ((),), (), False, False)
    ledger = Ledger(
        ModelFacts(layout, {"h.0.w": Shape(size, size)}), LoraConfig(), name, cap, seed=0
    )
    generator = np.random.default_rng(0)
    samples = generator.integers(50, 150, num)
    for _ in range(2):
        reports = {}
        for i, count in enumerate(samples):
            device = f"device-{i:03}"
            own = ledger.enrol(device, {"h.0.w": RANKS[i % len(RANKS)]})
            pairs = {"h.0.w": moved(own["h.0.w"], generator)}
            reports[device] = Report(1, int(count), pairs)
        floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        result = ledger.aggregate(reports)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "gib": peak / 2**20,
        "floor_gib": floor / 2**20,
        "rank": ledger.totals["h.0.w"].rank,
        "cut": result.cut_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=sorted({name for name, _ in CASES}))
    parser.add_argument("--case", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case >= 0:
        print(json.dumps(measure(*CASES[options.case], options.devices, options.size)))
        return
    rows = []
    for i, (name, cap) in enumerate(CASES):
        if name not in options.only:
            continue
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
        "both rounds and inputs included.",
        table(["rule", "rank cap", "seconds", "peak GiB", "ranks of dW", "cut off"], rows),
    ]
    save("aggregation", "\n\n".join(text))


if __name__ == "__main__":
    main()
