"""CPU time of a step of three devices and a coordinator, beside plain PEFT on the same samples.

    python benchmarks/residual_run.py [--rounds 8] [--labels device]

examples/base on E2E, all linear layers, rank 8, splits 2, 3 and 4 of 8, 8 sequences a device and
step, a round every 5 steps; every process has one thread. The processor time of all four processes
is read from /proc between two steps of a device, from round 3 on and to the end, so that starting
up is not in it and everything that a round costs is. Plain PEFT does the same 24 sequences a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "base"
DATA = ROOT.parent / "shared" / "data" / "e2e" / "trainset.csv"
SPLITS, BATCH, RANK, PER_ROUND, SEED, RATE = (2, 3, 4), 8, 8, 5, 0, 2e-3
FIRST_ROUND = 3
VARIANTS = (("fedavg", "auto"), ("exact", "auto"), ("exact", "low-rank"))


def data_config(data: Path, device: int) -> Any:
    """E2E as prompt and completion; every device has its own rows."""
    from edge_sdk.data.rows import DataConfig

    columns = {"prompt": "mr", "completion": "ref"}
    return DataConfig(path=str(data), columns=columns, limit=400 * (device + 1))


def plain(options: argparse.Namespace) -> None:
    """Fine-tune with PEFT and torch alone."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from edge_sdk.data.batches import Batches
    from edge_sdk.data.rows import load_rows
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
    from edge_sdk.model.weights import load_tokenizer

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(MODEL)
    limits = ModelLimits(vocab_size=len(tokenizer), max_positions=256)
    rows = []
    for number in range(len(SPLITS)):
        config = data_config(options.data, number)
        examples = tokenize_rows(load_rows(None, config), tokenizer, config, limits)
        rows.append(Batches(examples, BATCH, BATCH, SEED, f"d{number}"))
    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lora = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")
    network = peft.get_peft_model(network, lora).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for step in range(options.rounds * PER_ROUND):
        for batches in rows:
            (micro,) = batches.at(step).micro_batches
            ids, lengths = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.lengths)
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
            loss = network(
                input_ids=ids, attention_mask=mask, labels=torch.from_numpy(micro.labels)
            ).loss
            (loss / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, flush=True)


def device(options: argparse.Namespace) -> None:
    """Be a device, and say when a step is over."""
    from edge_sdk.client.callbacks import Callback
    from edge_sdk.client.client import EdgeClient
    from edge_sdk.client.config import ClientConfig
    from edge_sdk.protocol.messages import StepReport

    class Say(Callback):
        def on_step_end(self, report: StepReport) -> None:
            print("step", report.stamp.step, flush=True)

    name = f"d{options.number}"
    config = ClientConfig(
        coordinator=f"tcp://127.0.0.1:{options.port}",
        server_key=str(options.folder / "coordinator.key.pub"),
        secret_key=options.folder / f"{name}.key",
        data=data_config(options.data, options.number),
        cache=options.folder / f"cache-{name}",
        state=options.folder / f"state-{name}",
        threads=1,
    )
    EdgeClient(config, callback=Say()).run()


def coordinator(options: argparse.Namespace) -> None:
    """Serve the run."""
    import torch

    from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
    from coordinator.gateway.keys.allow_list import AllowList
    from coordinator.results.watchers import Watchers
    from coordinator.rounds.launch import serve
    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.runtime.training import TrainingConfig
    from edge_sdk.transport.keys import load_public_key

    torch.set_num_threads(1)
    for number in range(len(SPLITS)):
        key = load_public_key(options.folder / f"d{number}.key.pub")
        AllowList(options.folder / "devices.yaml").register(f"d{number}", key)
    config = ServeConfig(
        model=str(MODEL),
        listen=f"tcp://127.0.0.1:{options.port}",
        secret_key=options.folder / "coordinator.key",
        allow_list=options.folder / "devices.yaml",
        runs=options.folder / "runs",
        labels=options.labels,
        rounds=options.rounds,
        steps_per_round=PER_ROUND,
        min_devices=len(SPLITS),
        aggregation=options.aggregation,
        residual=options.residual,
        default=DeviceSettings(split=2, batch_size=BATCH, codec="bfloat16"),
        devices={f"d{n}": DeviceSettings(split=split) for n, split in enumerate(SPLITS)},
        lora=LoraConfig(r=RANK),
        training=TrainingConfig(learning_rate=RATE, lr_scheduler_type="constant", seed=SEED),
        evaluation=EvaluationConfig(on_devices=False),
        max_length=256,
    )
    serve(config, Watchers())


# ---- measuring -----------------------------------------------------------------------------------


def start(role: str, **flags: object) -> subprocess.Popen[str]:
    """Start this file as another process in *role*, with one thread."""
    command = [sys.executable, __file__, f"--role={role}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    env |= {n: "1" for n in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def used(processes: list[subprocess.Popen[str]]) -> list[float]:
    """Processor seconds of each process until now."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = []
    for process in processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        found.append((int(fields[11]) + int(fields[12])) / ticks)
    return found


def between(
    speaker: subprocess.Popen[str], processes: list[subprocess.Popen[str]], rounds: int
) -> list[float]:
    """Return processor seconds a step of each process, from round FIRST_ROUND to the last but one.

    Both ends are the first step of a round, so that whole rounds are in between.
    """
    marks = {(FIRST_ROUND - 1) * PER_ROUND: [], (rounds - 1) * PER_ROUND: []}  # type: dict[int, list[float]]
    assert speaker.stdout is not None
    for line in speaker.stdout:
        word, _, step = line.partition(" ")
        if word == "step" and int(step) in marks:
            marks[int(step)] = used(processes)
    (first, before), (last, after) = marks.items()
    return [(b - a) / (last - first) for a, b in zip(before, after, strict=True)]


def run_plain(options: argparse.Namespace) -> list[float]:
    """Plain PEFT, in a process of its own."""
    process = start("plain", rounds=options.rounds, data=options.data)
    found = between(process, [process], options.rounds)
    if process.wait():
        raise SystemExit("plain PEFT failed")
    return found


def run_split(options: argparse.Namespace, aggregation: str, residual: str) -> list[float]:
    """A coordinator and three devices; returns seconds a step, the coordinator's first."""
    from edge_sdk.transport.keys import create_key_pair

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = ["coordinator", *(f"d{n}" for n in range(len(SPLITS)))]
        for name in names:
            create_key_pair(folder / f"{name}.key")
        flags = {"folder": folder, "port": options.port, "rounds": options.rounds}
        flags |= {"labels": options.labels, "aggregation": aggregation, "residual": residual}
        flags |= {"data": options.data}
        processes = [start("coordinator", **flags)]
        processes += [start("device", number=n, **flags) for n in range(len(SPLITS))]
        try:
            found = between(processes[1], processes, options.rounds)
            if any(process.wait(timeout=120) for process in processes[1:]):
                raise SystemExit("a device failed")
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return found


def measure(options: argparse.Namespace) -> str:
    """Run everything in turn and return the report."""
    from report import header, table

    found: dict[str, list[list[float]]] = {}
    for repeat in range(options.repeats):
        found.setdefault("plain PEFT", []).append(run_plain(options))
        for aggregation, residual in VARIANTS:
            name = aggregation if aggregation == "fedavg" else f"{aggregation}, {residual}"
            found.setdefault(name, []).append(run_split(options, aggregation, residual))
            options.port += 1
            print(repeat, name, found[name][-1], file=sys.stderr)
    base = [sum(own) for own in found["plain PEFT"]]
    rows = []
    for name, runs in found.items():
        totals = [sum(own) for own in runs]
        ratio = statistics.median(a / b for a, b in zip(totals, base, strict=True))
        server = statistics.median(own[0] for own in runs) if len(runs[0]) > 1 else 0.0
        total = statistics.median(totals)
        rows.append(
            (name, f"{1e3 * total:.0f}", f"{1e3 * server:.0f}", f"{1e3 * (total - server):.0f}",
             f"{ratio:.3f}")
        )  # fmt: skip
    heads = ("what", "CPU ms/step", "coordinator", "devices", "x plain")
    return "\n\n".join(
        [
            header("CPU time of a step of three devices", options),
            f"examples/base, E2E, splits {SPLITS} of 8, r = {RANK} on all linear layers, "
            f"{len(SPLITS)} x {BATCH} sequences a step, {PER_ROUND} steps a round, labels: "
            f"{options.labels}, bfloat16 on the wire; start-up not counted. Medians of "
            f"{options.repeats}, ratios of one turn. Target: at most 1.10 x.",
            table(heads, rows),
        ]
    )


def main() -> None:
    """Dispatch on the role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--port", type=int, default=17410)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--labels", default="device")
    parser.add_argument("--aggregation", default="exact")
    parser.add_argument("--residual", default="auto")
    parser.add_argument("--no-write", action="store_true", help="print the report alone")
    options = parser.parse_args()
    roles = {"plain": plain, "device": device, "coordinator": coordinator}
    if options.role:
        roles[options.role](options)
    elif options.no_write:
        print(measure(options))
    else:
        from report import save

        save("residual-run", measure(options))


if __name__ == "__main__":
    main()
