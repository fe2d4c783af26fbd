"""What measuring importance costs a device: measured steps against the steps between them.

    OMP_NUM_THREADS=1 python benchmarks/importance.py [--pairs 30] [--every 10]

GPT-2-small's shape with random weights, blocks 0 .. 2 on the device's real runtime, 4 sequences of
128 tokens, LoRA r = 8, AdamW; a step is forward, backward and optimizer, without any network. In
one process measured and other steps take turns, and the forms too, so that whatever else the
machine does hits all alike. CPU time is the process's own; wall time also has what others do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from report import header, save, table

SPLIT, ROWS, LENGTH, RANK, SEED = 3, 4, 128, 8, 0
FORMS = ("free", "signed", "reference")
TARGETS = {"every linear layer": ("all-linear",), "c_attn alone": ("c_attn",)}


def make_runtime(targets: tuple[str, ...]) -> Any:
    """The device's blocks of a model with GPT-2-small's shape."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.layout import find_layout
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.torch_runtime import TorchRuntime
    from edge_sdk.runtime.training import TrainingConfig

    torch.manual_seed(SEED)
    config = GPT2Config(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=50256, use_cache=False
    )
    layout = find_layout(config, "causal-lm")
    lora = LoraConfig(r=RANK, target_modules=targets)
    state = GPT2LMHeadModel(config).state_dict()
    names = ["front", *(f"block.{i}" for i in range(SPLIT))]
    parts = {name: {n: state[n] for n in layout.part(name)} for name in names}
    here = tuple(f"{layout.blocks_path}.{i}." for i in range(SPLIT))
    weights = [n for n in find_targets(config, "causal-lm", layout, lora) if n.startswith(here)]
    plan = Plan(
        split=SPLIT,
        ranks=dict.fromkeys(weights, RANK),
        alphas={},
        batch_size=ROWS,
        micro_batch=ROWS,
    )
    training = TrainingConfig(learning_rate=2e-4, seed=SEED)
    return TorchRuntime(
        config, "causal-lm", layout, parts, plan, lora, training, 10_000, device="cpu"
    )


def make_step(runtime: Any) -> Callable[[str | None], tuple[float, float]]:
    """Return a function that runs one step, measured in a form or not, and its two times."""
    import numpy as np

    from edge_sdk.data.batches import MicroBatch

    generator = np.random.default_rng(SEED)
    ids = generator.integers(0, 50000, (ROWS, LENGTH))
    micro = MicroBatch(ids, np.full(ROWS, LENGTH, np.int32), ids)
    grad_BTD = generator.normal(0, 1e-4, (ROWS, LENGTH, 768)).astype(np.float32)

    def step(form: str | None) -> tuple[float, float]:
        runtime.state.meter.measure(form or "free", 1 if form else 0)
        wall, cpu = time.perf_counter(), time.process_time()
        runtime.forward(micro, 0, 0)
        runtime.backward(grad_BTD)
        runtime.step(0)
        found = time.perf_counter() - wall, time.process_time() - cpu
        assert bool(runtime.state.meter.take()) == bool(form)
        return found

    return step


def take_turns(step: Callable[[str | None], tuple[float, float]], pairs: int) -> dict[str, Any]:
    """Medians (wall, CPU) of each form's steps, and of all others."""
    times: dict[str, list[tuple[float, float]]] = {"other": []}
    for form in (*FORMS, *FORMS):  # warm up
        step(form)
    for _ in range(pairs):
        for form in FORMS:
            times["other"].append(step(None))
            times.setdefault(form, []).append(step(form))
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }


def measure(options: argparse.Namespace) -> str:
    """Run everything and return the report."""
    import torch

    from edge_sdk.lora.importance import REFERENCE_PERIODS

    rows = []
    for what, targets in TARGETS.items():
        found = take_turns(make_step(make_runtime(targets)), options.pairs)
        plain_wall, plain_cpu = found["other"]
        for form in FORMS:
            wall, cpu = found[form]
            steps = options.every * (REFERENCE_PERIODS if form == "reference" else 1)
            more = cpu / plain_cpu - 1
            rows.append(
                (
                    what,
                    form,
                    f"{plain_wall * 1e3:.0f} / {wall * 1e3:.0f}",
                    f"{plain_cpu * 1e3:.0f} / {cpu * 1e3:.0f}",
                    f"{more:+.1%}",
                    steps,
                    f"{more / steps:+.2%}",
                )
            )
    heads = (
        "measured",
        "form",
        "wall ms, other / measured step",
        "CPU ms, other / measured",
        "measured step (CPU)",
        "one in so many steps",
        "whole run",
    )
    return "\n\n".join(
        [
            header("Cost of measuring importance", options),
            f"GPT-2-small shape, blocks 0-{SPLIT - 1} on a device, {ROWS} x {LENGTH} tokens in one "
            f"micro-batch, r = {RANK}, float32, threads: {torch.get_num_threads()}. Medians of "
            f"{options.pairs} measured steps of each form, each "
            "after one that is not. Target for the whole run: free below 1 %, reference below 3 %.",
            table(heads, rows),
        ]
    )


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    save("importance", measure(options))


if __name__ == "__main__":
    main()
