"""What the split costs: one device + coordinator on one machine against plain PEFT.

    python benchmarks/overhead.py [--repeats 3] [--steps 12] [--labels server]

GPT-2-small's shape with random weights (12 blocks, 768), 8 sequences of real E2E length a step,
LoRA r = 4 on c_attn, AdamW. Each repeat runs both, one after the other, in processes of their own;
a step's time is the median over a repeat's steps after the first three. Memory is the peak resident
size of the process less that of the same process after its imports, measured at split 2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
BATCH, RANK, SKIPPED, SEED = 8, 4, 3, 0
TIMED_SPLIT, MEMORY_SPLIT = 3, 2


def make_model(folder: Path) -> None:
    """GPT-2-small's shape, random weights, GPT-2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=50256, use_cache=False
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "gpt2_tokenizer").save_pretrained(folder)


def data_config(limit: int = 400) -> dict[str, Any]:
    """E2E as prompt and completion."""
    columns = {"prompt": "mr", "completion": "ref"}
    return {"path": str(SHARED / "e2e" / "trainset.csv"), "columns": columns, "limit": limit}


def plain(model: Path, steps: int) -> dict[str, Any]:
    """Fine-tune the whole model with PEFT and torch alone, on the same batches."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edge_sdk.data.batches import Batches
    from edge_sdk.data.rows import DataConfig, load_rows
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
    from profiler.sensors.memory import peak_rss, reset_peak_rss, rss

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = DataConfig(**data_config())
    limits = ModelLimits(vocab_size=50257, max_positions=1024)
    examples = tokenize_rows(load_rows(None, config), tokenizer, config, limits)
    batches = Batches(examples, BATCH, BATCH, SEED, "device", pad_id=50256)
    floor = rss().value or 0
    reset_peak_rss()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    network = peft.get_peft_model(network, lora).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        (micro,) = batches.at(step).micro_batches
        ids, lengths = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.lengths)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        labels = torch.from_numpy(micro.labels)
        loss = network(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = (peak_rss().value or 0) - floor
    return {"seconds": seconds, "loss": float(loss.detach()), "peak": peak, "floor": floor}


def device(folder: Path, port: int) -> dict[str, Any]:
    """Be the device of a run and time its steps from one report to the next."""
    import peft  # noqa: F401 - part of the import floor, as in `plain`
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from edge_sdk.client.callbacks import Callback
    from edge_sdk.client.client import EdgeClient
    from edge_sdk.client.config import ClientConfig
    from edge_sdk.data.rows import DataConfig
    from edge_sdk.protocol.messages import StepReport
    from edge_sdk.protocol.plan import Plan
    from profiler.sensors.memory import peak_rss, reset_peak_rss, rss

    found: dict[str, Any] = {"seconds": [], "floor": 0}

    class Clock(Callback):
        def on_plan(self, plan: Plan) -> None:
            AutoTokenizer.from_pretrained(folder / "model")  # `plain` has read its data by here
            found["floor"] = rss().value or 0
            reset_peak_rss()

        def on_step_end(self, report: StepReport) -> None:
            now = time.perf_counter()
            if "last" in found:
                found["seconds"].append(now - found["last"])
            found["last"], found["loss"] = now, report.loss
            found["peak"] = (peak_rss().value or 0) - found["floor"]

    config = ClientConfig(
        coordinator=f"tcp://127.0.0.1:{port}",
        server_key=str(folder / "coordinator.key.pub"),
        secret_key=folder / "device.key",
        data=DataConfig(**data_config()),
        cache=folder / "cache",
        state=folder / "state",
    )
    EdgeClient(config, callback=Clock()).run()
    found.pop("last")
    return found


def coordinator(folder: Path, port: int, steps: int, split: int, labels: str) -> dict[str, Any]:
    """Serve one round of *steps* steps."""
    from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
    from coordinator.gateway.keys.allow_list import AllowList
    from coordinator.results.watchers import Watchers
    from coordinator.rounds.launch import serve
    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.runtime.training import TrainingConfig
    from edge_sdk.transport.keys import load_public_key

    AllowList(folder / "devices.yaml").register(
        "device", load_public_key(folder / "device.key.pub")
    )
    config = ServeConfig(
        model=str(folder / "model"),
        listen=f"tcp://127.0.0.1:{port}",
        secret_key=folder / "coordinator.key",
        allow_list=folder / "devices.yaml",
        runs=folder / "runs",
        labels=labels,  # type: ignore[arg-type]
        rounds=1,
        steps_per_round=steps,
        default=DeviceSettings(split=split, r=RANK, batch_size=BATCH, codec="bfloat16"),
        lora=LoraConfig(r=RANK, target_modules=("c_attn",)),
        training=TrainingConfig(learning_rate=2e-4, lr_scheduler_type="constant", seed=SEED),
        evaluation=EvaluationConfig(on_devices=False),
    )
    return {"outcome": serve(config, Watchers())}


def start(role: str, folder: Path, **options: object) -> subprocess.Popen[str]:
    """Start this file as another process in *role*."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, __file__, f"--role={role}", f"--folder={folder}", *flags]
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a role and read its last line."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a role failed with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def run_split(folder: Path, port: int, steps: int, split: int, labels: str) -> dict[str, Any]:
    """One device and one coordinator, in processes of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch)
        (own / "model").symlink_to(folder / "model")
        (own / "cache").symlink_to(folder / "cache")
        from edge_sdk.transport.keys import create_key_pair

        for name in ("coordinator", "device"):
            create_key_pair(own / f"{name}.key")
        options = {"port": port, "steps": steps + 1, "split": split, "labels": labels}
        server = start("coordinator", own, **options)
        found = result(start("device", own, **options))
        result(server)
    return found


def median(seconds: list[float]) -> float:
    """Median of a repeat's steps, warm-up left out."""
    return statistics.median(seconds[SKIPPED:])


def measure(options: argparse.Namespace) -> str:
    """Run everything and return the report."""
    from report import header, table

    times: dict[str, list[float]] = {"plain PEFT": [], "labels: server": [], "labels: device": []}
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        (folder / "cache").mkdir()
        for repeat in range(options.repeats):
            whole = result(start("plain", folder, steps=options.steps))
            times["plain PEFT"].append(median(whole["seconds"]))
            memory.setdefault("plain PEFT", []).append(whole["peak"])
            for labels in ("server", "device"):
                found = run_split(folder, options.port + repeat, options.steps, TIMED_SPLIT, labels)
                times[f"labels: {labels}"].append(median(found["seconds"]))
                print(repeat, labels, times, whole["loss"], found["loss"], file=sys.stderr)
            small = run_split(folder, options.port + repeat, 4, MEMORY_SPLIT, "server")
            memory.setdefault("device, split 2", []).append(small["peak"])
            memory.setdefault("import floor", []).append(small["floor"])
    base = statistics.median(times["plain PEFT"])
    rows = [
        (name, f"{statistics.median(t):.3f}", _spread(t), f"{statistics.median(t) / base:.3f}")
        for name, t in times.items()
    ]
    whole_peak = statistics.median(memory["plain PEFT"])
    peaks = [
        (name, f"{statistics.median(m) / 2**20:.0f}", f"{whole_peak / statistics.median(m):.2f}")
        for name, m in memory.items()
    ]
    return "\n\n".join(
        [
            header("Overhead of the split", options),
            f"GPT-2-small shape, split {TIMED_SPLIT}, {BATCH} E2E sequences a step, r = {RANK} on "
            f"c_attn, CURVE on, bfloat16 on the wire. {options.repeats} repeats of "
            f"{options.steps} steps. Target: at most 1.10 x plain PEFT (labels: server).",
            table(("what", "s/step (median)", "min-max", "x plain"), rows),
            "Peak resident memory above the import floor (python, torch, transformers, peft and "
            "the tokenised data). Target: plain PEFT at least 2.5 x the device at split 2.",
            table(("what", "MiB (median)", "plain / this"), peaks),
        ]
    )


def _spread(values: list[float]) -> str:
    return f"{min(values):.3f}-{max(values):.3f}"


def main() -> None:
    """Dispatch on the role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--port", type=int, default=17310)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--split", type=int, default=TIMED_SPLIT)
    parser.add_argument("--labels", default="server")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.role == "plain":
        print(json.dumps(plain(options.folder / "model", options.steps)))
    elif options.role == "device":
        print(json.dumps(device(options.folder, options.port)))
    elif options.role == "coordinator":
        print(
            json.dumps(
                coordinator(
                    options.folder, options.port, options.steps, options.split, options.labels
                )
            )
        )
    else:
        from report import save

        save("overhead", measure(options))


if __name__ == "__main__":
    main()
