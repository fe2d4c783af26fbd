"""How many devices one coordinator serves: real sessions, and a model that costs almost nothing.

    python benchmarks/fleet.py [--devices 10 100 300 1000] [--minutes 1.0] [--labels server]

The coordinator is the real command, `coordinator serve` with console, files and live file, in a
process of its own; a thread beside it notes the processor time of each of its threads. Devices are
real sessions over loopback with CURVE, many to a process, that compute nothing: whatever the
coordinator asks for is answered at once (fleet_sessions.py). A share of them leaves every minute,
half of these without a word, and comes back within seconds.

What is counted: the processor time of all of the coordinator's threads but `compute` (waves,
aggregation, checkpoints), for each step that a device has done: `loop` is the main thread,
`gateway` the thread of that name, `sockets` the threads of libzmq (TCP, CURVE), `rest` all others.
Samples are exact if a round's number in metrics.jsonl is that of the members that stayed, each of
whom has done each step once. One that is found dead after it has handed in counts if the round was
closed by then, which the files do not say: there the number may be either.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from fleet_sessions import GOODBYE, FleetFacts, serve_devices
from report import header, save, table
from soak_fleet import free_port, write

from coordinator.results.run_folder import RunFolder

BATCH, TOKENS, WIDTH, VOCAB, RANK = 4, 16, 8, 64, 4
SAMPLE_S = 0.5
MIB = 2**20
LONG_S = 300.0
THREADS = {"MainThread": "loop", "gateway": "gateway", "compute": "compute"}


# ---- the coordinator's process ----


def coordinate(folder: Path) -> int:
    """Be the coordinator, and note what its threads cost."""
    from coordinator.cli import main

    threading.Thread(target=sample, args=(folder / "cpu.jsonl",), daemon=True).start()
    return main(["serve", "--config", "run.yaml"])


def sample(path: Path) -> None:
    """Write down the seconds of each thread and the process's memory, again and again."""
    page = os.sysconf("SC_PAGE_SIZE")
    with path.open("a", encoding="utf-8") as out:
        while True:
            names = {thread.native_id: thread.name for thread in threading.enumerate()}
            spent: dict[str, float] = defaultdict(float)
            for task in Path("/proc/self/task").iterdir():
                try:
                    seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                except OSError:
                    continue  # it has ended
                name = names.get(int(task.name), "").split("_")[0]
                spent[THREADS.get(name, "rest" if name else "sockets")] += seconds
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * page
            out.write(json.dumps({"at": time.monotonic(), "rss": rss, **spent}) + "\n")
            out.flush()
            time.sleep(SAMPLE_S)


# ---- the run ----


def make_model(folder: Path) -> None:
    """Write a model of two blocks, and a tokenizer, that cost as little as can be."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = "-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ."
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="-"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    make: Any = PreTrainedTokenizerFast  # it has no types
    tokenizer = make(tokenizer_object=plain, pad_token="-", unk_token="-")
    tokenizer.save_pretrained(folder)


class Fleet:
    """One run with so many devices."""

    def __init__(self, folder: Path, count: int, options: argparse.Namespace) -> None:
        from edge_sdk.transport.keys import create_key_pair, make_key_pair

        self.folder, self.count, self._options = folder, count, options
        folder.mkdir(parents=True)
        self.names = [f"d{number}" for number in range(count)]
        keys = {name: make_key_pair() for name in self.names}
        secrets = {name: (pair.public, pair.secret) for name, pair in keys.items()}
        write(folder / "keys.json", secrets)
        write(folder / "devices.yaml", {"devices": {n: p.public for n, p in keys.items()}})
        public = create_key_pair(folder / "coordinator.key").public
        make_model(folder / "model")
        address = f"tcp://127.0.0.1:{free_port()}"
        self.facts = FleetFacts(address, public, BATCH, TOKENS, WIDTH, options.labels)
        write(
            folder / "run.yaml",
            {
                "model": "model",
                "listen": address,
                "secret_key": "coordinator.key",
                "allow_list": "devices.yaml",
                "runs": "runs",
                "name": "run",
                "labels": options.labels,
                "waves": options.waves,
                "wave_tokens": options.wave_tokens,
                "rounds": 1_000_000,
                "steps_per_round": options.steps,
                "min_devices": max(1, count // 2),
                "default": {"split": 1, "batch_size": BATCH, "codec": "float32"},
                "lora": {"r": RANK, "target_modules": ["q_proj", "v_proj"]},
                "evaluation": {"on_devices": False},
                "patience_s": 60.0,
                "device": "cpu",
                "compute": "float32",
            },
        )
        self.log = folder / "coordinator.log"
        self.coordinator = self._coordinate()
        self.devices: list[Any] = []

    def _coordinate(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--role", str(self.folder)]
        if self._options.profile:
            command = [*self._options.profile.split(), *command]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        with self.log.open("wb") as out:
            return subprocess.Popen(
                command, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def start_devices(self) -> None:
        """Start the processes of the devices."""
        context = multiprocessing.get_context("spawn")
        most = -(-self.count // min(self._options.processes, max(1, self.count // 10)))
        for number, first in enumerate(range(0, self.count, most)):
            churn = self._options.churn / 100.0, self._options.settle
            names = self.names[first : first + most]
            arguments = (self.folder, number, names, self.facts, churn)
            process = context.Process(target=serve_devices, args=arguments, daemon=True)
            process.start()
            self.devices.append(process)

    def rows(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yield what the devices have written down."""
        for path in self.folder.glob("devices-*.jsonl"):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                if row["kind"] == kind:
                    yield row

    @property
    def run(self) -> RunFolder:
        """The run's own folder."""
        return RunFolder(self.folder / "runs" / "run")

    def wait_until(self, is_so: Any, what: str) -> None:
        """Wait for something."""
        until_s = time.monotonic() + LONG_S
        while not is_so():
            if self.coordinator.poll() is not None or time.monotonic() > until_s:
                sys.exit(f"{what}: no. The coordinator says:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def end(self) -> None:
        """End what is left."""
        if self.coordinator.poll() is None:
            self.coordinator.send_signal(signal.SIGINT)
            try:
                self.coordinator.wait(120.0)
            except subprocess.TimeoutExpired:
                self.coordinator.kill()
        for process in self.devices:
            process.kill()
            process.join()


# ---- what has come of it ----


def judge(fleet: Fleet) -> dict[str, Any]:
    """Compare what the coordinator has counted with what the devices have written down."""
    trained: Counter[tuple[str, int, int, int]] = Counter(
        (row["name"], row["round"], row["attempt"], row["step"]) for row in fleet.rows("step")
    )
    steps = fleet._options.steps
    rows = {row["round"]: row for row in fleet.run.rows("metrics.jsonl")}
    finished: dict[tuple[int, int], set[str]] = defaultdict(set)
    for name, round_, attempt, step in trained:
        if step == (round_ + 1) * steps - 1:
            finished[round_, attempt].add(name)
    goodbyes: dict[int, set[str]] = defaultdict(set)
    lost: dict[int, set[str]] = defaultdict(set)
    members: dict[int, tuple[int, set[str]]] = {}
    found: Counter[str] = Counter()
    now = -1
    for event in fleet.run.rows("events.jsonl"):
        kind, who = event["event"], event.get("device")
        found[kind] += 1
        if kind == "round.started":
            now = event["round"]
            goodbyes[now], lost[now] = set(), set()
            members[now] = event["attempt"], set(event["devices"])
        elif kind == "device.left" and now in members:
            members[now][1].discard(who)
            (goodbyes if event["reason"] == GOODBYE else lost)[now].add(who)
    wrong = doubled = samples = 0
    for done in sorted(rows)[1:]:
        attempt, stayed = members[done - 1]
        handed_in = finished[done - 1, attempt]
        # Who has handed in before it said goodbye counts as well.
        stayed = stayed | (handed_in & goodbyes[done - 1])
        doubled += sum(
            trained[name, done - 1, attempt, (done - 1) * steps + step] > 1
            for name in stayed
            for step in range(steps)
        )
        least = whole(trained, stayed, (done - 1, attempt), steps)
        most = whole(trained, stayed | (handed_in & lost[done - 1]), (done - 1, attempt), steps)
        parts, rest = divmod(rows[done]["samples"], BATCH * steps)
        wrong += bool(rest) or not least <= parts <= most
        samples += rows[done]["samples"]
    errors = Counter(row["error"] for row in fleet.rows("error"))
    return {
        "rounds": len(rows) - 1,
        "wrong": wrong,
        "doubled": doubled,
        "samples": samples,
        "left": found["device.left"],
        "rejected": found["message.rejected"],
        "errors": errors,
    }


def whole(
    trained: Counter[tuple[str, int, int, int]],
    names: set[str],
    where: tuple[int, int],
    steps: int,
) -> int:
    """Count who of *names* has done each step of a round and attempt once."""
    own = range(where[0] * steps, (where[0] + 1) * steps)
    return sum(all(trained[(name, *where, step)] == 1 for step in own) for name in names)


def at(rows: list[dict[str, Any]], moment_s: float) -> dict[str, Any]:
    """Return the row that was written just before a moment."""
    return [row for row in rows if row["at"] <= moment_s][-1]


def window(fleet: Fleet, began_s: float, ended_s: float) -> dict[str, float]:
    """Return what happened between two moments."""
    samples = [json.loads(line) for line in (fleet.folder / "cpu.jsonl").read_text().splitlines()]
    first, last = at(samples, began_s), at(samples, ended_s)
    inside = range(int(first["at"] * 1000), int(last["at"] * 1000))
    steps = sum(int(row["at"] * 1000) in inside for row in fleet.rows("step"))
    counts = defaultdict(list)
    for path in fleet.folder.glob("devices-*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["kind"] == "count":
                counts[path.name].append(row)
    moved = sum(
        at(rows, last["at"])[way] - at(rows, first["at"])[way]
        for rows in counts.values()
        for way in ("up", "down")
    )
    starts = defaultdict(list)
    for row in fleet.rows("start"):
        if int(row["at"] * 1000) in inside:
            starts[row["round"], row["attempt"]].append(row["at"])
    handed = [max(each) - min(each) for each in starts.values()]
    cost = {
        part: 1e3 * (last.get(part, 0.0) - first.get(part, 0.0)) / max(1, steps)
        for part in ("loop", "gateway", "sockets", "rest", "compute")
    }
    seconds = last["at"] - first["at"]
    return {
        "steps": steps,
        "seconds": seconds,
        "events": moved / seconds,
        "pace": steps / seconds / fleet.count,
        "handout": median(handed) if handed else float("nan"),
        "rss0": first["rss"] / MIB,
        "rss_half": at(samples, (first["at"] + last["at"]) / 2)["rss"] / MIB,
        "rss1": last["rss"] / MIB,
        "idle": samples[0]["rss"] / MIB,
        **cost,
    }


def measure(folder: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run with so many devices."""
    fleet = Fleet(folder, count, options)
    try:
        fleet.wait_until(lambda: "listening at" in fleet.log.read_text(), "to listen")
        listening_s = time.monotonic()
        time.sleep(2 * SAMPLE_S)
        fleet.start_devices()

        def joined() -> int:
            return sum(r["event"] == "device.joined" for r in fleet.run.rows("events.jsonl"))

        fleet.wait_until(lambda: joined() >= count, "all joined")
        joined_s = time.monotonic()
        time.sleep(options.settle)
        began_s = time.monotonic()
        end_s = began_s + 60.0 * options.minutes
        while time.monotonic() < end_s:
            time.sleep(0.5)
            if fleet.coordinator.poll() is not None:
                sys.exit(f"the coordinator has ended: {fleet.log.read_text()[-3000:]}")
        ended_s = time.monotonic()
    finally:
        fleet.end()
    idle = at([json.loads(x) for x in (folder / "cpu.jsonl").read_text().splitlines()], listening_s)
    found = {"count": count, "joins": joined_s - listening_s, **window(fleet, began_s, ended_s)}
    return {**found, **judge(fleet), "idle": idle["rss"] / MIB}


HEADS = (
    "devices",
    "events/s",
    "steps/s each",
    "loop",
    "gateway",
    "sockets",
    "rest",
    "all beside the model, ms a device-step",
    "compute",
    "hand-out, s",
    "all joined, s",
    "MiB start, half, end",
    "MiB a session",
    "rounds; wrong, doubled",
    "left, rejected, errors",
)


def row_of(found: dict[str, Any]) -> tuple[object, ...]:
    """Return the row of the table."""
    parts = [found[part] for part in ("loop", "gateway", "sockets", "rest")]
    return (
        found["count"],
        f"{found['events']:.0f}",
        f"{found['pace']:.2f}",
        *(f"{part:.2f}" for part in parts),
        f"{sum(parts):.2f}",
        f"{found['compute']:.2f}",
        f"{found['handout']:.2f}",
        f"{found['joins']:.1f}",
        f"{found['rss0']:.0f}, {found['rss_half']:.0f}, {found['rss1']:.0f}",
        f"{(found['rss1'] - found['idle']) / found['count']:.2f}",
        f"{found['rounds']}; {found['wrong']}, {found['doubled']}",
        f"{found['left']}, {found['rejected']}, {sum(found['errors'].values())}",
    )


def main() -> None:
    """Measure each number of devices and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--churn", type=float, default=5.0, help="percent that leave a minute")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--labels", choices=("server", "device"), default="server")
    parser.add_argument("--waves", choices=("available", "gathered"), default="available")
    parser.add_argument("--wave-tokens", type=int, help="wave_tokens of the run; else its default")
    parser.add_argument("--processes", type=int, default=2, help="of devices")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds before it is measured")
    parser.add_argument("--profile", default="", help="put before the coordinator's command")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for all files, kept afterwards")
    parser.add_argument("--role", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        sys.exit(coordinate(options.role))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in options.devices:
            folder = (options.keep or Path(scratch)).resolve() / f"fleet-{count}"
            found = measure(folder, count, options)
            rows.append(row_of(found))
            print(dict(zip(HEADS, rows[-1], strict=True)), dict(found["errors"]), flush=True)
    text = "\n\n".join([header("Many devices on one coordinator", options), table(HEADS, rows)])
    print(text) if options.no_write else save("fleet", text)


if __name__ == "__main__":
    main()
