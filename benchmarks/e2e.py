"""Three devices cut at 2, 3 and 4 of 8 blocks against centralised PEFT LoRA at equal samples.

    python benchmarks/e2e.py [--steps 300] [--rates 2e-3 5e-3]

E2E NLG (loss on the references), our base model, r = 8 on all linear layers, three contiguous
thirds of the training file, batch 16 a device. The centralised run sees the same samples in the
same steps: each step is the three devices' batches together. Both get every learning rate of the
grid; the best of each is compared. Dev NLL per token on the first --dev references, in float32.

The end-of-text token is left out (`append_eos: false`): this base model cannot learn it with a
frozen, tied head (see examples/base/README.md), and it would weigh on both sides alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import header, save, table

from coordinator.results.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "base"
SHARED = ROOT.parent / "shared" / "data" / "e2e"
COLUMNS = {"prompt": "mr", "completion": "ref"}
SPLITS = (2, 3, 4)
RANK, BATCH = 8, 16


def write_shards(folder: Path, dev: int) -> None:
    """Consecutive thirds of the training file, and the first references of the dev file."""
    with (SHARED / "trainset.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    third = len(rows) // len(SPLITS)
    parts = {f"shard-{i}": rows[i * third : (i + 1) * third] for i in range(len(SPLITS))}
    with (SHARED / "devset.csv").open(encoding="utf-8", newline="") as file:
        parts["dev"] = list(csv.DictReader(file))[:dev]
    for name, part in parts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in part:
                line = {"prompt": row["mr"], "completion": row["ref"]}
                file.write(json.dumps(line) + "\n")


def central(folder: Path, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Plain PEFT on the pooled batches."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edge_sdk.data.batches import Batches, eval_batches
    from edge_sdk.data.rows import DataConfig, load_rows
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
    from edge_sdk.runtime.training import TrainingConfig, learning_rate

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    limits = ModelLimits(vocab_size=4096, max_positions=512)

    def examples(name: str) -> list[Any]:
        config = DataConfig(path=str(folder / f"{name}.jsonl"), append_eos=False)
        return tokenize_rows(load_rows(None, config), tokenizer, config, limits)

    streams = [
        Batches(examples(f"shard-{i}"), BATCH, BATCH, seed, f"d{i}") for i in range(len(SPLITS))
    ]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lora = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    schedule = TrainingConfig(learning_rate=rate, warmup_steps=10)

    def loss_of(batch: Any) -> torch.Tensor:
        ids, lengths = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        labels = torch.from_numpy(batch.labels)
        loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    for step in range(steps):
        for stream in streams:
            (micro,) = stream.at(step).micro_batches
            (loss_of(micro) / len(streams)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, steps)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for micro in eval_batches(examples("dev"), 32):
            total += float(loss_of(micro)) * micro.num_targets
            targets += micro.num_targets
    return {"nll": total / targets}


def split(folder: Path, options: argparse.Namespace, rate: float, rule: str) -> dict[str, Any]:
    """The same through one coordinator and three devices, each a process of its own."""
    out = folder / f"run-{rule}-{options.labels}-{rate}"
    out.mkdir()
    shell("coordinator", "keygen", str(out / "coordinator.key"))
    settings = {}
    for index, depth in enumerate(SPLITS):
        key = out / f"d{index}.key"
        shell("edge-sdk", "keygen", str(key))
        flags = ["--allow-list", str(out / "devices.yaml")]
        shell("coordinator", "client", "register", f"d{index}", f"{key}.pub", *flags)
        settings[f"d{index}"] = {"split": depth}
    config = {
        "model": str(MODEL),
        "listen": f"tcp://127.0.0.1:{options.port}",
        "secret_key": str(out / "coordinator.key"),
        "allow_list": str(out / "devices.yaml"),
        "runs": str(out),
        "name": "run",
        "labels": options.labels,
        "rounds": options.steps // options.interval,
        "steps_per_round": options.interval,
        "aggregation": rule,
        "min_devices": len(SPLITS),
        "default": {"batch_size": BATCH, "codec": options.codec},
        "devices": settings,
        "lora": {"r": RANK, "lora_alpha": 16},
        "training": {"learning_rate": rate, "warmup_steps": 10, "seed": options.seed},
        "evaluation": {
            "data": {"path": str(folder / "dev.jsonl"), "append_eos": False},
            "batch_size": 32,
            "every_rounds": 1_000_000,
            "on_devices": False,
        },
    }
    (out / "run.json").write_text(json.dumps(config))
    processes = [spawn("coordinator", "serve", "--config", str(out / "run.json"))]
    for index in range(len(SPLITS)):
        device = {
            "coordinator": config["listen"],
            "server_key": str(out / "coordinator.key.pub"),
            "secret_key": str(out / f"d{index}.key"),
            "data": {"path": str(folder / f"shard-{index}.jsonl"), "append_eos": False},
            "state": str(out / f"state-{index}"),
            "cache": str(folder / "cache"),
            "threads": 1,
        }
        (out / f"d{index}.json").write_text(json.dumps(device))
        processes.append(spawn("edge-sdk", "run", "--config", str(out / f"d{index}.json")))
    wait_for(processes)
    rows = RunFolder(out / "run").rows("metrics.jsonl")
    return {"start": rows[0]["eval"]["loss"], "nll": rows[-1]["eval"]["loss"]}


def wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all; the first to fail takes the others down."""
    while any(process.poll() is None for process in processes):
        if failed := [p for p in processes if p.poll()]:
            for process in processes:
                process.kill()
            raise SystemExit(f"{failed[0].args} ended with {failed[0].returncode}")
        time.sleep(0.5)


def shell(*command: str) -> None:
    """Run one of our console scripts."""
    subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def spawn(*command: str) -> subprocess.Popen[bytes]:
    """Start one of our console scripts."""
    script = str(Path(sys.executable).parent / command[0])
    return subprocess.Popen([script, *command[1:]], stdout=subprocess.DEVNULL)


def main() -> None:
    """Run the grid and report the best of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--interval", type=int, default=10, help="steps between aggregations")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3])
    parser.add_argument("--dev", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", default="server")
    parser.add_argument("--codec", default="bfloat16")
    parser.add_argument("--port", type=int, default=17350)
    options = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    results: dict[str, dict[float, float]] = {"central": {}, "exact": {}, "fedavg": {}}
    start = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shards(folder, options.dev)
        for rate in options.rates:
            results["central"][rate] = central(folder, options.steps, rate, options.seed)["nll"]
            for rule in ("exact", "fedavg"):
                found = split(folder, options, rate, rule)
                start, results[rule][rate] = found["start"], found["nll"]
            print(rate, results, file=sys.stderr, flush=True)
    best = min(results["central"].values())
    names = {
        "central": "centralised PEFT LoRA",
        "exact": "split 2/3/4, exact",
        "fedavg": "split 2/3/4, fedavg",
    }
    rows = [
        (
            names[name],
            *(f"{nll:.4f}" for nll in by_rate.values()),
            f"{(min(by_rate.values()) / best - 1):+.2%}",
        )
        for name, by_rate in results.items()
    ]
    heads = ("run", *(f"lr {rate:g}" for rate in options.rates), "best against centralised")
    samples = options.steps * BATCH * len(SPLITS)
    text = (
        f"Dev NLL per token after {samples:,} samples ({options.steps} steps of 3 x {BATCH}); "
        f"before training {start:.4f}. Labels: {options.labels}, {options.codec} on the wire, "
        f"aggregation every {options.interval} steps, seed {options.seed}. "
        "Target: within 1 % of centralised."
    )
    save(
        "e2e",
        "\n\n".join([header("E2E: split against centralised", options), text, table(heads, rows)]),
    )


if __name__ == "__main__":
    main()
