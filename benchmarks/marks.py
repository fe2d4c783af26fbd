"""What it costs to save rounds on their way, and what a device that is killed costs then.

    python benchmarks/marks.py [--devices 2] [--steps 40] [--rounds 3] [--repeats 5]

Real commands on this machine: a coordinator and its devices train the model of the examples, with
rounds that are saved only between them (`off`), every 60 s (`default`), every 2 s, and after every
step. The first is run beside the others in turn; times are medians over rounds but the first of a
run, and ratios those of neighbours. Then a device is killed with SIGKILL at the middle of the last
round and started again, and the steps are counted that were trained twice.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from report import header, save, table
from soak_fleet import SoakFleet

from coordinator.results.run_folder import RunFolder

MODES: dict[str, float | None] = {"off": None, "default": 60.0, "every 2 s": 2.0, "every step": 0.0}
LIMIT_S = 600.0


def fleet_of(folder: Path, cache: Path, options: argparse.Namespace, every_s: Any) -> SoakFleet:
    """Return a run that is not started."""
    return SoakFleet(
        folder,
        cache,
        (4,) * options.devices,
        has_relays=False,
        rounds=options.rounds,
        steps_per_round=options.steps,
        save_every_s=every_s,
    )


def run(fleet: SoakFleet) -> tuple[float, list[float]]:
    """Run to the end; return the seconds of a round, and those that each saving took."""
    try:
        fleet.serve()
        fleet.start()
        fleet.wait_until(fleet.is_over, LIMIT_S)
    finally:
        fleet.end()
    rows = RunFolder(fleet.path).rows("telemetry.jsonl")
    saved = [row["seconds"] for row in fleet.events("round.saved")]
    return median(row["seconds"] for row in rows[1:]), saved


def killed(fleet: SoakFleet, options: argparse.Namespace) -> int:
    """Kill a device at the middle of the last round; return the steps that are done again."""
    middle = (options.rounds - 1) * options.steps + options.steps // 2
    reached, before = 0, options.rounds

    def has_begun_again() -> bool:
        nonlocal reached
        reached = max(reached, at_step(fleet))
        return attempts(fleet) > before

    try:
        fleet.serve()
        fleet.start()
        fleet.wait_until(lambda: at_step(fleet) >= middle, LIMIT_S)
        fleet.devices["d0"].kill()
        fleet.start("d0")
        fleet.wait_until(has_begun_again, LIMIT_S)
        newest = max(RunFolder(fleet.path).checkpoints())
        fleet.wait_until(fleet.is_over, LIMIT_S)
    finally:
        fleet.end()
    return max(0, reached - int(newest.name.split("-")[1]))


def at_step(fleet: SoakFleet) -> int:
    """Return the step at which a run stands, as it says itself."""
    live = RunFolder(fleet.path).rows("live.json") if fleet.path.exists() else []
    return int(live[0]["step"] or 0) if live else 0


def attempts(fleet: SoakFleet) -> int:
    """Count the beginnings of rounds."""
    return Counter(row["event"] for row in fleet.events("round.started"))["round.started"]


def measure(options: argparse.Namespace, folder: Path) -> str:
    """Return the tables."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    saved: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(options.repeats):
        for mode, every_s in MODES.items():
            fleet = fleet_of(folder / f"{repeat}-{mode}", folder / "cache", options, every_s)
            took_s, each = run(fleet)
            seconds[mode].append(took_s)
            saved[mode] += each
    rows = []
    for mode in MODES:
        ratios = [a / b for a, b in zip(seconds[mode], seconds["off"], strict=True)]
        times = len(saved[mode]) / options.repeats
        cost = f"{1000 * median(saved[mode]):.0f} ms" if saved[mode] else "-"
        spread = f"{min(ratios):.3f}..{max(ratios):.3f}"
        rows.append((mode, f"{median(seconds[mode]):.2f}", f"{median(ratios):.3f}", spread))
        rows[-1] += (f"{times:.1f}", cost)
    heads = ("saved", "s a round", "ratio to off", "smallest..largest", "times a run", "each")
    again = [
        (mode, killed(fleet_of(folder / f"kill-{mode}", folder / "cache", options, s), options))
        for mode, s in MODES.items()
        if mode in ("off", "every 2 s")
    ]
    lost = table(("saved", "steps done again after SIGKILL in mid-round"), again)
    return f"{table(heads, rows)}\n\n{lost}\n"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default="", help="name of the result in benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = measure(options, Path(folder))
    whole = f"{header('Rounds saved on their way', options)}\n\n{text}"
    print(whole)
    if options.save:
        save(options.save, whole)


if __name__ == "__main__":
    main()
