"""One hostile device in a run of four: what it costs the other three, and the coordinator.

    python benchmarks/hostile.py [--kinds hellos parts ...] [--repeats 1] [--rounds 4] [--steps 12]

Three honest devices and the coordinator are the real commands, each with one thread, over loopback
with encryption. The fourth has a registered key, and a process of `hostile_device.py` that gets
only the CPU time that nobody else wants, because it is another machine's. It begins when the first
round does.
Time counts from there to the end of the last round, beside the same run without it in the same
repeat. The result is compared bit by bit. A kind that takes part in rounds teaches something until
it lies: there the result differs by its share, and what counts is the loss that is left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
from hostile_device import KINDS, OUTSIDE
from report import header, save, table
from soak_fleet import Program, SoakFleet, difference

from coordinator.results.run_folder import RunFolder

HERE = Path(__file__).parent
SPLITS = (2, 3, 4, 3)
MIB = 2**20
LOOK_S = 0.1
FIRST_S, LAST_S = 120.0, 600.0
ALONE = "nobody"


@dataclass
class Found:
    """What one run has shown."""

    wall_s: float
    peak_bytes: int
    disk_bytes: int
    loss: float
    ends: str
    """How the run has ended."""
    said: str
    """The last that the hostile device has noted."""
    adapter: dict[str, object] = field(repr=False)


class Peak(threading.Thread):
    """The most memory that a process has held while we looked."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self.num_bytes, self._is_over = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        """Look until the process ends."""
        while not self._is_over.wait(LOOK_S):
            try:
                self.num_bytes = max(self.num_bytes, self._process.memory_info().rss)
            except psutil.Error:
                return

    def stop(self) -> int:
        """Look no longer; return the most, in bytes."""
        self._is_over.set()
        self.join()
        return self.num_bytes


def trial(kind: str, folder: Path, cache: Path, options: argparse.Namespace) -> Found:
    """Run three honest devices, with a fourth of *kind* beside them."""
    fleet = SoakFleet(
        folder,
        cache,
        SPLITS,
        has_relays=False,
        rounds=options.rounds,
        steps_per_round=options.steps,
        min_devices=3,
        patience_s=30.0,
    )
    honest, fourth = fleet.names[:3], fleet.names[3]
    try:
        coordinator = fleet.serve()
        peak = Peak(coordinator.pid)
        peak.start()
        fleet.start(*honest)
        fleet.wait_until(lambda: bool(fleet.events("round.started")), FIRST_S)
        began = time.time()
        hostile = None
        if kind != ALONE:
            script = str(HERE / "hostile_device.py")
            hostile = Program(
                fleet.folder / f"{fourth}.log",
                Path(sys.executable).name,
                script,
                kind,
                str(fleet.folder / f"{fourth}.yaml"),
            )
            fleet.devices[fourth] = hostile
        fleet.wait_until(fleet.is_over, LAST_S)
        rows = RunFolder(fleet.path).rows("metrics.jsonl")
        size = sum(f.stat().st_size for f in fleet.path.glob("*.jsonl"))
        size += fleet.folder.joinpath("coordinator.log").stat().st_size
        ended = rows[-1]["time"] if "time" in rows[-1] else time.time()
        return Found(
            wall_s=ended - began,
            peak_bytes=peak.stop(),
            disk_bytes=size,
            loss=rows[-1].get("train_loss", float("nan")),
            ends=f"{coordinator.code}",
            said=(hostile.text.strip().splitlines() or ["nothing"])[-1] if hostile else "",
            adapter=dict(fleet.adapter()),
        )
    finally:
        fleet.end()


def main() -> None:
    """Run every kind beside a run without it; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    found: dict[str, list[Found]] = {kind: [] for kind in (ALONE, *options.kinds)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for repeat in range(options.repeats):
            for kind in found:
                place = folder / f"{repeat}-{kind}".replace(" ", "-")
                run = trial(kind, place, folder / "cache", options)
                found[kind].append(run)
                print(kind, run, flush=True)
    rows = []
    alone = found[ALONE]
    for kind in options.kinds:
        runs = found[kind]
        pairs = list(zip(runs, alone, strict=True))
        pace = median(theirs.wall_s / ours.wall_s for ours, theirs in pairs)
        more = max(ours.peak_bytes - theirs.peak_bytes for ours, theirs in pairs) / MIB
        disk = max(ours.disk_bytes - theirs.disk_bytes for ours, theirs in pairs) / 1024
        apart = max(difference(ours.adapter, theirs.adapter) for ours, theirs in pairs)
        result = "equal" if apart == 0.0 else f"dW {apart:.1e}"
        rows.append(
            [
                kind,
                "no" if kind in OUTSIDE else "yes",
                f"{pace:.2f}",
                result,
                f"{runs[0].loss:.4f}",
                f"{more:+.0f}",
                f"{disk:+.0f}",
                ", ".join(sorted({run.ends for run in runs})),
                runs[0].said.replace("|", "/")[:90],
            ]
        )
    heads = ["kind", "member", "pace", "result", "loss", "MiB", "kB on disk", "exit", "it notes"]
    seconds = ", ".join(f"{run.wall_s:.1f}" for run in alone)
    notes = (
        f"Without it the three take {seconds} s, loss {alone[0].loss:.4f}, the coordinator "
        f"{alone[0].peak_bytes / MIB:.0f} MiB. Pace: of the honest three, beside that, median of "
        f"{options.repeats}; memory and disk: the most. Exit: the coordinator's."
    )
    text = "\n\n".join(
        [header("One hostile device of four", options), notes, table(heads, rows), ""]
    )
    print(save("hostile", text))


if __name__ == "__main__":
    main()
