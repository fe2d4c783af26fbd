"""Many devices that come and go for half an hour: nothing lost, nothing doubled, memory flat.

    python benchmarks/soak_churn.py [--devices 200 --minutes 30]

The coordinator is the real command. Devices are `EdgeClient`s, ten to a process; processes are
killed, single devices stop, and both come back. Each device writes down every step that it has
trained; a round's samples must be those of the members that stayed in its last attempt, each of
whom has trained each step of it once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from report import header, save, table
from soak_fleet import BATCH, SoakFleet

from coordinator.results.run_folder import RunFolder
from edge_sdk.client.callbacks import Callback

PER_PROCESS = 10
HEAVY = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "edge_sdk.client.client",
    "edge_sdk.runtime.torch_runtime",
)
STEPS = 2
MIB = 2**20
SAMPLE_S = 5.0
# Windows of the run over which the coordinator's memory is compared.
WINDOWS = 10


def devices(folder: Path, names: list[str], stay_s: float, seed: int) -> None:
    """Be the devices of one process, each of which stops and comes back at times."""
    os.chdir(folder)
    threads = [threading.Thread(target=device, args=(name, stay_s, seed)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def device(name: str, stay_s: float, seed: int) -> None:
    """Be one device until the run is over."""
    from edge_sdk.client.client import STOPPED, EdgeClient
    from edge_sdk.client.config import ClientConfig
    from edge_sdk.config.loader import load_config
    from edge_sdk.errors import EdgeError

    draw = random.Random(f"{name} {seed}")
    config = load_config(ClientConfig, Path(f"{name}.yaml"), [], env={})
    log = os.open(f"{name}.steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        client = EdgeClient(config, callback=Steps(log))
        timer = threading.Timer(draw.expovariate(1 / stay_s), client.stop)
        timer.daemon = True
        timer.start()
        try:
            if client.run() != STOPPED:
                return
        except EdgeError as error:
            row = {"error": f"{type(error).__name__}: {error}"}
            os.write(log, (json.dumps(row) + "\n").encode())
        timer.cancel()
        time.sleep(draw.uniform(0.0, 5.0))


class Steps(Callback):
    """Writes down every step at once, so that it outlives the process."""

    def __init__(self, log: int) -> None:
        self._log = log

    def on_step_end(self, report: Any) -> None:
        """Write the step down."""
        stamp = report.stamp
        row = {"round": stamp.round, "attempt": stamp.attempt, "step": stamp.step}
        os.write(self._log, (json.dumps(row) + "\n").encode())


class Churn:
    """Processes of devices that are killed and started again."""

    def __init__(self, fleet: SoakFleet, stay_s: float, seed: int) -> None:
        self._fleet, self._stay_s, self._draw = fleet, stay_s, random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*HEAVY])
        names = fleet.names
        self._groups = [names[i : i + PER_PROCESS] for i in range(0, len(names), PER_PROCESS)]
        self._processes: list[Any] = [None] * len(self._groups)
        self.kills = 0
        for number in range(len(self._groups)):
            self._start(number)

    def _start(self, number: int) -> None:
        arguments = (self._fleet.folder, self._groups[number], self._stay_s, self.kills)
        process = self._context.Process(target=devices, args=arguments, daemon=True)
        process.start()
        self._processes[number] = process

    def kill_one(self) -> None:
        """Kill a process of devices, and start another one a little later."""
        number = self._draw.randrange(len(self._processes))
        self._processes[number].kill()
        self._processes[number].join()
        self.kills += 1
        time.sleep(self._draw.uniform(0.0, 2.0))
        self._start(number)

    def end(self) -> None:
        """End all of them."""
        for process in self._processes:
            process.kill()
            process.join()


def run(fleet: SoakFleet, options: argparse.Namespace) -> tuple[list[int], int]:
    """Let devices come and go; return the coordinator's memory over time, and the kills."""
    coordinator = fleet.serve()
    fleet.wait_until(lambda: "listening at" in coordinator.text, 300.0)
    churn, draw = Churn(fleet, options.stay, options.seed), random.Random(options.seed)
    memory: list[int] = []
    process, began = psutil.Process(coordinator.pid), time.monotonic()
    next_kill_s = began + 60.0
    try:
        while (now_s := time.monotonic()) < began + 60.0 * options.minutes:
            if fleet.is_over():
                sys.exit(f"the coordinator has ended: {coordinator.text[-2000:]}")
            memory.append(process.memory_info().rss)
            if now_s >= next_kill_s:
                churn.kill_one()
                next_kill_s = time.monotonic() + draw.expovariate(1 / options.kill_every)
            time.sleep(SAMPLE_S)
        coordinator.signal(signal.SIGINT)
        coordinator.wait(120.0)
    finally:
        churn.end()
    return memory, churn.kills


def judge(fleet: SoakFleet) -> dict[str, Any]:
    """Compare what the coordinator has counted with what the devices have written down."""
    trained: Counter[tuple[str, int, int, int]] = Counter()
    errors: Counter[str] = Counter()
    for name in fleet.names:
        for line in (fleet.folder / f"{name}.steps").read_text().splitlines():
            row = json.loads(line)
            if "error" in row:
                errors[row["error"]] += 1
            else:
                trained[name, row["round"], row["attempt"], row["step"]] += 1
    folder = RunFolder(fleet.path)
    rows = {row["round"]: row for row in folder.rows("metrics.jsonl")}
    members: dict[int, tuple[int, set[str]]] = {}
    found = {"joins": 0, "leaves": 0, "rejected": 0, "attempts": 0}
    now = -1
    for event in folder.rows("events.jsonl"):
        kind, who = event["event"], event.get("device")
        if kind == "round.started":
            now = event["round"]
            members[now] = event["attempt"], set(event["devices"])
            found["attempts"] += 1
        elif kind == "device.left" and now in members:
            members[now][1].discard(who)
        found["joins"] += kind == "device.joined"
        found["leaves"] += kind == "device.left"
        found["rejected"] += kind == "message.rejected"
    wrong = doubled = 0
    for done in sorted(rows)[1:]:
        attempt, stayed = members[done - 1]
        counts = [
            trained[name, done - 1, attempt, (done - 1) * STEPS + step]
            for name in stayed
            for step in range(STEPS)
        ]
        doubled += sum(count > 1 for count in counts)
        wrong += rows[done]["samples"] != BATCH * sum(count == 1 for count in counts)
    return {**found, "rounds": len(rows) - 1, "wrong": wrong, "doubled": doubled, "errors": errors}


def main() -> None:
    """Run it and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kill-every", type=float, default=60.0, help="mean seconds between kills")
    parser.add_argument("--stay", type=float, default=1200.0, help="mean seconds to a stop")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds (patience_s)")
    parser.add_argument("--labels", default="server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for all files, kept afterwards")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the devices' processes, which are many
    with tempfile.TemporaryDirectory() as scratch:
        fleet = SoakFleet(
            (options.keep or Path(scratch)) / "churn",
            Path(scratch) / "cache",
            (1,) * options.devices,
            has_relays=False,
            labels=options.labels,
            rounds=100_000,
            steps_per_round=STEPS,
            min_devices=options.devices // 4,
            patience_s=options.patience,
            evaluation={"on_devices": False},
        )
        try:
            memory, kills = run(fleet, options)
        finally:
            fleet.end()
        found = judge(fleet)
    size = len(memory) // WINDOWS
    windows = [median(memory[i * size : (i + 1) * size]) / MIB for i in range(WINDOWS)]
    warm = windows[2:]  # a fifth of the run is its warm-up
    rows = [
        ("rounds done, attempts", f"{found['rounds']}, {found['attempts']}"),
        ("devices that joined, left", f"{found['joins']}, {found['leaves']}"),
        ("processes of ten devices killed", kills),
        ("rounds whose samples are not exact", found["wrong"]),
        ("steps trained twice in one attempt", found["doubled"]),
        ("messages rejected", found["rejected"]),
        ("devices' errors", "; ".join(f"{n} x {e}" for e, n in found["errors"].items()) or "none"),
        ("coordinator's memory by tenth of the run, MiB", ", ".join(f"{w:.0f}" for w in windows)),
        ("largest against smallest after a fifth of the run", f"{max(warm) / min(warm):.3f} x"),
    ]
    parts = [header("Soak: many devices come and go", options), table(("what", "found"), rows)]
    save("soak-churn", "\n\n".join(parts))


if __name__ == "__main__":
    main()
