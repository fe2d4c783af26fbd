"""How hidden states, gradients and adapters travel: bytes, quality and time of every codec.

    python benchmarks/codecs.py [--epochs 5] [--samples 128] [--seeds 0 1 2] [--trial]

E2E NLG, three devices cut after blocks 2, 3 and 4 (our base model: 8 blocks, hidden size 128;
stories260K: 5 blocks, hidden size 64), r = 8 on all linear layers, batch 8 a device, `exact`.
Coordinator and devices are those of a deployment, in one process; every message is encoded and
decoded as on a socket. Bytes are those of all messages of training, up and down, adapters and
headers included. 1 is SplitLoRA's traffic: hidden states and gradients in float32 without
padding, labels, and the devices' adapters in float32 up and down each round. Codec time is that
of all writing and reading of hidden states and gradients for the batches of a step, as both
sides do it, beside the wall time of a step of all three devices in the same run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from report import header, save, table

from coordinator.lab.simulation.config import SimulationConfig
from coordinator.lab.simulation.run import simulate
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import StepDone
from edge_sdk.config.loader import load_config
from edge_sdk.held_states import HeldStates
from edge_sdk.protocol import codecs, residual

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("EDGESPLIT_DATA") or ROOT.parent / "shared" / "data")
MODELS = {"base": ROOT / "examples" / "base", "stories260K": SHARED / "stories260K" / "hf"}
CUTS = {"d2": 2, "d3": 3, "d4": 4}
RANK, BATCH = 8, 8
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"codec": "bfloat16"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "residual": {"codec": "residual"},
    "residual, adapters in 8 bits": {"codec": "residual", "exchange": {"codec": "int8"}},
    "residual, adapters in 4 bits": {"codec": "residual", "exchange": {"codec": "int4"}},
}


Runs = dict[tuple[str, str], list[Future[Any]]]
"""The runs of a model and a way, a seed each."""


@dataclass
class Seen:
    """What the steps of a run have been."""

    tokens: int = 0
    lengths: list[float] = field(default_factory=list)

    def see(self, event: RunEvent) -> None:
        """Count the tokens of every step of every device."""
        if isinstance(event, StepDone):
            self.tokens += event.report.num_tokens
            self.lengths.append(event.report.num_tokens / event.report.num_sequences)


@dataclass(frozen=True)
class Found:
    """One run."""

    share: float
    """Bytes beside SplitLoRA's."""
    nll: float
    step_s: float
    length: float
    """Tokens of a sequence, in the mean."""


def write_data(folder: Path, samples: int, dev: int, seed: int) -> None:
    """As many references as all devices together have, drawn with *seed*, and those of dev."""
    draw = np.random.default_rng(seed)
    for name, count in (("trainset", samples * len(CUTS)), ("devset", dev)):
        with (SHARED / "e2e" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        chosen = draw.permutation(len(rows))[:count] if name == "trainset" else range(count)
        lines = [
            json.dumps({"prompt": rows[i]["mr"], "completion": rows[i]["ref"]}) for i in chosen
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(model: str, way: dict[str, Any], seed: int, options: argparse.Namespace) -> Found:
    """Train once."""
    steps = options.epochs * options.samples // BATCH
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder, options.samples, options.dev, seed)
        exchange = {"exchange": way["exchange"]} if "exchange" in way else {}
        config = {
            "model": str(MODELS[model]),
            "runs": str(folder / "runs"),
            "labels": "server",
            "rounds": max(1, steps // options.interval),
            "steps_per_round": min(steps, options.interval),
            "default": {"batch_size": BATCH, "codec": way["codec"]},
            "devices": {name: {"split": cut} for name, cut in CUTS.items()},
            "lora": {"r": RANK, "lora_alpha": 16},
            "training": {"learning_rate": options.rate, "warmup_steps": 10, "seed": seed},
            "evaluation": {
                "data": {"path": str(folder / "devset.jsonl"), "append_eos": False},
                "every_rounds": 1_000_000,
                "on_devices": False,
            },
            "simulation": {
                "data": {"path": str(folder / "trainset.jsonl"), "append_eos": False},
                "devices": {name: {} for name in CUTS},
                "threads": 1,
            },
            **exchange,
        }
        (folder / "run.json").write_text(json.dumps(config))
        seen = Seen()
        loaded = load_config(SimulationConfig, folder / "run.json", env={})
        begin_s = time.perf_counter()
        result = simulate(loaded, seen)
        wall_s = time.perf_counter() - begin_s
    first, last = result.rounds[0], result.rounds[-1]
    assert last.loss is not None
    one = splitlora_bytes(model, seen.tokens, len(result.rounds) - 1)
    return Found(
        share=(last.bytes_up + last.bytes_down - first.bytes_up - first.bytes_down) / one,
        nll=last.loss,
        step_s=wall_s / steps,
        length=statistics.mean(seen.lengths),
    )


def splitlora_bytes(model: str, tokens: int, rounds: int) -> float:
    """Bytes of SplitLoRA in float32 without padding: two tensors, labels, adapters both ways."""
    shape = json.loads((MODELS[model] / "config.json").read_text())
    width, mlp = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim") or width // shape["num_attention_heads"]
    queries, keys = head * shape["num_attention_heads"], head * shape["num_key_value_heads"]
    block = RANK * (2 * (width + queries) + 2 * (width + keys) + 3 * (width + mlp))
    adapters = 2 * 4 * block * sum(CUTS.values()) * rounds
    return tokens * (2 * 4 * width + 4) + adapters


def codec_seconds(model: str, codec: str, length: float) -> float:
    """Seconds in which one device's hidden states and gradients of a step are written and read."""
    width = json.loads((MODELS[model] / "config.json").read_text())["hidden_size"]
    shape = (BATCH, round(length), width)
    draw = np.random.default_rng(0)
    hidden_BTD, move_BTD = (draw.standard_normal(shape, np.float32) for _ in range(2))
    lengths, samples = [shape[1]] * BATCH, list(range(BATCH))
    gradient, ours, theirs = (
        residual.plain(codec, residual.GRADIENT),
        HeldStates(2**30),
        HeldStates(2**30),
    )
    times = []
    for step in range(7):
        state_BTD = hidden_BTD + np.float32(0.1 * step) * move_BTD
        begin_s = time.perf_counter()
        if codec == residual.RESIDUAL:
            tensors, starts = residual.code(state_BTD, lengths, samples, ours)
            got = {name: codecs.as_read(*tensor) for name, tensor in tensors.items()}
            got["lengths"] = np.array(lengths, np.int32)
            residual.read(got, samples, starts, theirs)
        else:
            codecs.as_read(state_BTD, codec)
        codecs.as_read(move_BTD, gradient)
        times.append(time.perf_counter() - begin_s)
    return min(times[1:])


def rows_of(model: str, runs: Runs, options: argparse.Namespace) -> list[tuple[object, ...]]:
    """Gather the runs of every way with every seed on one model; print as they end."""
    rows, plain = [], [0.0] * len(options.seeds)
    for name in options.ways:
        way = WAYS[name]
        found = [one.result() for one in runs[model, name]]
        if name == "bfloat16":
            plain = [one.nll for one in found]
        codec_s = codec_seconds(model, way["codec"], statistics.mean(one.length for one in found))
        step_s = statistics.median(one.step_s for one in found)
        worse = [
            one.nll / due - 1 if due else float("nan")
            for one, due in zip(found, plain, strict=True)
        ]
        rows.append(
            (
                model,
                name,
                f"{statistics.mean(one.share for one in found):.4f}",
                f"{statistics.mean(one.nll for one in found):.4f}",
                f"{statistics.mean(worse):+.2%} ({min(worse):+.2%} .. {max(worse):+.2%})",
                f"{1e3 * codec_s * len(CUTS):.2f}",
                f"{codec_s * len(CUTS) / step_s:.1%}",
            )
        )
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128, help="of each device")
    parser.add_argument("--interval", type=int, default=40, help="steps between aggregations")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--dev", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--trial", action="store_true", help="one seed, few samples")
    options = parser.parse_args()
    if options.trial:
        options.seeds, options.samples, options.dev = options.seeds[:1], 64, 100
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:  # one thread of torch each
        runs: Runs = {
            (model, name): [pool.submit(run, model, WAYS[name], s, options) for s in options.seeds]
            for model in options.models
            for name in options.ways
        }
        rows = [row for model in options.models for row in rows_of(model, runs, options)]
    heads = (
        "model",
        "codec",
        "bytes",
        "dev NLL",
        "beside bfloat16",
        "codec ms a step",
        "of a step",
    )
    text = (
        f"{options.epochs} epochs of 3 x {options.samples} samples, {len(options.seeds)} seeds, "
        f"aggregation every {options.interval} steps. Bytes: SplitLoRA's in float32 without padding"
        " are 1. Targets: at most 0.10 of the bytes within 0.5 % of bfloat16's NLL, codec time at "
        "most 5 % of a step."
    )
    report = "\n\n".join([header("Codecs", options), text, table(heads, rows)])
    if options.trial:
        print(report)
    else:
        save("codecs", report)


if __name__ == "__main__":
    main()
