"""What a sceptic would ask: plain PEFT against one, three and eight devices, on the same batches.

    python benchmarks/against_peft.py [--rounds 10] [--steps 3] [--repeats 3] [--fleets 1 3 8]
        [--rates 2e-3 8e-3]

Our base model, LoRA r = 8 on all linear layers, AdamW, --batch sequences a step in each
arrangement: a device has its share of them. Aggregation `fedex`. Coordinator and devices are the
real commands, each with one thread, over loopback with encryption; plain PEFT is one process with
one thread, which takes the batches of all devices of an arrangement as one, padded together. Each
repeat runs every arrangement and plain PEFT on its batches, in turn.

Time and CPU time count from the start of the first round to the end of the last one; what comes
before and after (imports, model, data; export, goodbye) is the column `start and end`. Bytes are
those of all links, both ways, rounds after the first. The loss is the mean per token on --dev
references that nobody has trained on, computed by PEFT itself with the adapter that each has left;
with several --rates each stands beside the other at every rate, and at the best of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from against_peft_report import COSTS, REST, Found, Runs, cost_row, loss_row, rest_row
from report import header, save, table

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "base"
SHARED = ROOT.parent / "shared" / "data" / "e2e"
RANK, ALPHA, SEED = 8, 16, 0
# Blocks of the devices, of eight; three in the mean.
SPLITS = {1: (3,), 2: (2, 4), 3: (2, 3, 4), 4: (2, 2, 4, 4), 8: (2, 2, 3, 3, 3, 3, 4, 4)}
# Seconds between two looks at the processes, and until a run counts as stuck.
LOOK_S, LONG_S = 0.03, 600.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


# ---- data ----


def write_data(folder: Path, rows: int, dev: int) -> str:
    """Write train.jsonl and dev.jsonl; returns what is in them."""
    if SHARED.is_dir():
        pairs = {}
        for name, file, count in (("train", "trainset", rows), ("dev", "devset", dev)):
            with (SHARED / f"{file}.csv").open(encoding="utf-8", newline="") as lines:
                pairs[name] = [(row["mr"], row["ref"]) for row in csv.DictReader(lines)]
            random.Random(SEED).shuffle(pairs[name])
            pairs[name] = pairs[name][:count]
        what = "E2E NLG (loss on the references)"
    else:
        script = ROOT / "examples" / "data" / "make_sample.py"
        flags = ["--out", str(folder), "--shards", "1", "--pairs", str(2 * rows)]
        subprocess.run([sys.executable, str(script), *flags], check=True, stdout=subprocess.DEVNULL)
        pairs = {
            name: read(folder / file)[:count]
            for name, file, count in (("train", "shard-0.jsonl", rows), ("dev", "dev.jsonl", dev))
        }
        what = "sample texts of examples/data (loss on the completions)"
    for name, own in pairs.items():
        write_rows(folder / f"{name}.jsonl", own)
    return f"{what}: {len(pairs['train']):,} to train, {len(pairs['dev']):,} to evaluate"


def read(file: Path) -> list[tuple[str, str]]:
    """Read prompts and completions."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(row["prompt"], row["completion"]) for row in rows]


def write_rows(file: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write prompts and completions as JSON lines."""
    rows = ({"prompt": prompt, "completion": completion} for prompt, completion in pairs)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_shards(folder: Path, names: list[str]) -> None:
    """Deal the training rows out to the devices."""
    rows = read(folder / "train.jsonl")
    for index, name in enumerate(names):
        write_rows(folder / f"{name}.jsonl", rows[index :: len(names)])


def tokenised(file: Path) -> list[Any]:
    """Read a file as a device does."""
    from transformers import AutoTokenizer

    from edge_sdk.data.rows import DataConfig, load_rows
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows

    config = DataConfig(path=str(file), append_eos=False)
    limits = ModelLimits(vocab_size=4096, max_positions=512)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenize_rows(load_rows(None, config), tokenizer, config, limits)


# ---- plain PEFT ----


def loss_of(model: Any, micro: Any) -> Any:
    """Return the mean loss of a batch, as transformers computes it."""
    import torch

    ids_BT, lengths_B = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.lengths)
    mask_BT = (torch.arange(ids_BT.shape[1])[None] < lengths_B[:, None]).long()
    labels_BT = torch.from_numpy(micro.labels)
    return model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss


def plain(folder: Path, out: Path, devices: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune the whole model with torch and PEFT alone, on the batches of so many devices."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from edge_sdk.data.batches import Batches, pad

    names = [f"d{index}" for index in range(devices)]
    rows = [tokenised(folder / f"{name}.jsonl") for name in names]
    share = options.batch // devices
    streams = [
        Batches(own, share, share, SEED, name) for own, name in zip(rows, names, strict=True)
    ]
    torch.manual_seed(SEED)
    whole = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = peft.get_peft_model(whole, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    cpu_s, wall_s = time.process_time(), time.monotonic()
    for step in range(options.rounds * options.steps):
        chosen = [
            own[i]
            for own, stream in zip(rows, streams, strict=True)
            for i in stream.samples_at(step)
        ]
        loss_of(model, pad(chosen, 0)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    took = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.monotonic() - wall_s}
    model.save_pretrained(out)
    return {**took, "peak_bytes": status_bytes(os.getpid(), "VmHWM")}


def run_plain(folder: Path, out: Path, devices: int, options: argparse.Namespace) -> Found:
    """The same in a process of its own."""
    began_s = time.monotonic()
    before_s = os.times().children_user + os.times().children_system
    found = role("plain", folder, options, out=out, devices=devices)
    cpu_s = os.times().children_user + os.times().children_system - before_s
    wall_s = time.monotonic() - began_s
    return Found(
        cpu_s=found["cpu_s"],
        device_cpu_s=found["cpu_s"],
        wall_s=found["wall_s"],
        peak_bytes=found["peak_bytes"],
        link_bytes=0.0,
        start_cpu_s=cpu_s - found["cpu_s"],
        start_wall_s=wall_s - found["wall_s"],
    )


def evaluate(folder: Path, adapters: list[str]) -> dict[str, float]:
    """Return the loss of the base model with each adapter, computed by PEFT."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from edge_sdk.data.batches import eval_batches

    batches = list(eval_batches(tokenised(folder / "dev.jsonl"), 32))
    targets = sum(micro.num_targets for micro in batches)
    found = {}
    for adapter in adapters:
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        if adapter:
            model = peft.PeftModel.from_pretrained(model, adapter)
        model.eval()
        with torch.no_grad():
            losses = [float(loss_of(model, micro)) * micro.num_targets for micro in batches]
        found[adapter] = sum(losses) / targets
    return found


def imports() -> dict[str, int]:
    """Return what a process holds that has imported what a device does, and nothing else."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    return {"peak_bytes": status_bytes(os.getpid(), "VmRSS")}


# ---- devices and coordinator ----


@dataclass
class Meter:
    """CPU time and memory of processes, as the kernel counts them, while they run."""

    pids: list[int]
    cpu_s: dict[int, float] = field(default_factory=dict)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    def look(self) -> None:
        """Read all that still run."""
        for pid in self.pids:
            try:
                words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.cpu_s[pid] = (int(words[11]) + int(words[12])) * TICK_S
                self.peak_bytes[pid] = status_bytes(pid, "VmHWM")
            except (OSError, ValueError):
                continue  # it has ended: what was read last counts


def status_bytes(pid: int, field_: str) -> int:
    """Return a line of /proc/PID/status in bytes.

    Raises:
        ValueError: The process has ended.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    value = next((line.split()[1] for line in lines if line.startswith(f"{field_}:")), None)
    if value is None:
        raise ValueError(f"process {pid} has ended")
    return int(value) * 1024


def run_fleet(folder: Path, out: Path, devices: int, options: argparse.Namespace) -> Found:
    """One coordinator and its devices, from the first process's start to the last one's end."""
    from soak_fleet import SoakFleet

    fleet = SoakFleet(out, folder / "cache", SPLITS[devices], has_relays=False, **settings(options))
    point_at_shards(fleet, folder, options.batch // devices)
    began_s = time.monotonic()
    try:
        server = fleet.serve()
        fleet.start()
        meter = Meter([server.pid, *(program.pid for program in fleet.devices.values())])

        def wait_for(is_so: Any) -> tuple[float, dict[int, float]]:
            def looked() -> bool:
                meter.look()
                failed = [p for p in (server, *fleet.devices.values()) if p.code not in (None, 0)]
                if failed:
                    raise SystemExit(f"{failed[0].log.name}:\n{failed[0].text[-2000:]}")
                return bool(is_so())

            fleet.wait_until(looked, LONG_S)
            return time.monotonic(), dict(meter.cpu_s)

        first_s, first_cpu = wait_for(lambda: fleet.events("round.started"))
        last_s, last_cpu = wait_for(lambda: len(telemetry(fleet)) >= options.rounds)
        programs = [server, *fleet.devices.values()]
        end_s, end_cpu = wait_for(lambda: all(p.code is not None for p in programs))
    finally:
        fleet.end()
    spent = {pid: last_cpu[pid] - first_cpu[pid] for pid in meter.pids}
    return Found(
        cpu_s=sum(spent.values()),
        device_cpu_s=sum(spent.values()) - spent[server.pid],
        wall_s=last_s - first_s,
        peak_bytes=max(peak for pid, peak in meter.peak_bytes.items() if pid != server.pid),
        link_bytes=bytes_a_sample(telemetry(fleet), options),
        start_cpu_s=sum(end_cpu.values()) - sum(spent.values()),
        start_wall_s=end_s - began_s - (last_s - first_s),
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the run is told; all else are defaults."""
    return {
        "labels": options.labels,
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "aggregation": "fedex",
        "lora": {"r": RANK, "lora_alpha": ALPHA},
        "training": {
            "learning_rate": options.rate,
            "lr_scheduler_type": "constant",
            "seed": SEED,
        },
        "evaluation": {"on_devices": False},
    }


def point_at_shards(fleet: Any, folder: Path, share: int) -> None:
    """Give each device its rows and its share of the batch."""
    from soak_fleet import write

    write_shards(folder, fleet.names)
    fleet.run["default"] = {"batch_size": share, "codec": "bfloat16"}
    write(fleet.folder / "run.yaml", fleet.run)
    for name in fleet.names:
        file = fleet.folder / f"{name}.yaml"
        device = json.loads(file.read_text(encoding="utf-8"))
        device["data"] = {"path": str(folder / f"{name}.jsonl"), "append_eos": False}
        write(file, device)


def telemetry(fleet: Any) -> list[dict[str, Any]]:
    """Return the rows of all rounds that have ended."""
    from coordinator.results.run_folder import RunFolder

    if not fleet.path.exists():
        return []
    return [row for row in RunFolder(fleet.path).rows("telemetry.jsonl") if row["devices"]]


def bytes_a_sample(rows: list[dict[str, Any]], options: argparse.Namespace) -> float:
    """Return the bytes on all links for a sample, of the rounds after the first."""

    def so_far(row: dict[str, Any]) -> int:
        return sum(own["bytes_up"] + own["bytes_down"] for own in row["devices"].values())

    samples = (len(rows) - 1) * options.steps * options.batch
    return (so_far(rows[-1]) - so_far(rows[0])) / samples if samples else float("nan")


# ---- all of it ----


def role(name: str, folder: Path, options: argparse.Namespace, **more: object) -> Any:
    """Run this file as another process in a role; returns what it prints."""
    same = {key: getattr(options, key) for key in ("rounds", "steps", "batch", "rate")}
    told = {key: value for key, value in {**same, **more}.items() if value is not None}
    flags = [f"--{key}={value}" for key, value in told.items()]
    command = [sys.executable, __file__, f"--role={name}", f"--folder={folder}", *flags]
    quiet = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **quiet}
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace) -> str:
    """Run everything and return the report."""
    found: Runs = {}
    adapters: dict[tuple[int, bool, float], str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "cache").mkdir()
        samples = options.rounds * options.steps * options.batch
        data = write_data(folder, samples, options.dev)
        floor = role("imports", folder, options)["peak_bytes"]
        for repeat, rate, devices in product(range(options.repeats), options.rates, options.fleets):
            told = argparse.Namespace(**{**vars(options), "rate": rate})
            out = folder / f"run-{devices}-{rate:g}-{repeat}"
            plain_out = folder / f"plain-{devices}-{rate:g}"
            split = run_fleet(folder, out, devices, told)
            whole = run_plain(folder, plain_out, devices, told)
            found.setdefault((devices, True), []).append(split)
            found.setdefault((devices, False), []).append(whole)
            adapters[devices, True, rate] = str(out / "runs" / "run" / "adapter")
            adapters[devices, False, rate] = str(plain_out)
            print(repeat, rate, devices, split, whole, file=sys.stderr, flush=True)
        losses = role("evaluate", folder, options, adapters=":".join(["", *adapters.values()]))
    words = (
        f"{data}; {samples:,} samples in {options.rounds} rounds of {options.steps} steps of "
        f"{options.batch}. LoRA r = {RANK} on all linear layers, `fedex`, labels: "
        f"{options.labels}, bfloat16 on the wire, devices of {', '.join(shapes(options))} of 8 "
        f"blocks. Medians of {options.repeats * len(options.rates)} runs; x: beside plain PEFT on "
        f"the same batches in the same repeat. Loss before training: {losses['']:.4f}."
    )
    left = {key: losses[adapter] for key, adapter in adapters.items()}
    return "\n\n".join(
        [
            header("Against plain PEFT", options),
            words,
            table(COSTS, [cost_row(key, found, samples) for key in found]),
            "Memory is the most that one process has held, of the largest device or of plain "
            f"PEFT; the imports of a device alone are {floor / 2**20:.0f} MiB of it.",
            table(REST, [rest_row(key, found, floor) for key in found]),
            "Loss by learning rate, and each at its best.",
            table(
                ["what", *(f"{rate:g}" for rate in options.rates), "at its best", "against plain"],
                [loss_row(key, left) for key in found],
            ),
        ]
    )


def shapes(options: argparse.Namespace) -> list[str]:
    """Return the blocks of the devices of each arrangement."""
    return ["/".join(map(str, SPLITS[devices])) for devices in options.fleets]


def main() -> None:
    """Dispatch on the role."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--batch", type=int, default=24, help="sequences of a step, all devices")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fleets", type=int, nargs="+", default=[1, 3, 8], choices=SPLITS)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--labels", choices=("device", "server"), default="device")
    parser.add_argument("--dev", type=int, default=500, help="references to evaluate on")
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    uneven = [devices for devices in options.fleets if options.batch % devices]
    if uneven and not options.role:
        parser.error(f"--batch {options.batch} cannot be shared by {uneven[0]} devices")
    if options.role == "plain":
        print(json.dumps(plain(options.folder, options.out, options.devices, options)))
    elif options.role == "evaluate":
        print(json.dumps(evaluate(options.folder, options.adapters.split(":"))))
    elif options.role == "imports":
        print(json.dumps(imports()))
    else:
        save("against-peft", measure(options))


if __name__ == "__main__":
    main()
