"""What it saves to run norm, head and loss only where there is a target, beside running them all.

    OMP_NUM_THREADS=1 python benchmarks/targets.py [--steps 6] [--repeats 5] [--data ../shared/data]

* *bytes*: the messages of three devices that keep their labels, on E2E (prompt and completion),
  with examples/base and splits 2, 3 and 4, in bfloat16;
* *head*: peak memory and CPU time of norm, head and loss, forward and backward, of 512 tokens with
  Qwen2-0.5B's head (151,936 words, 896 wide), in a process of their own for each case;
* *step*: CPU time of a device's whole step (all blocks and the head, LoRA r = 8 on every linear
  layer, 8 sequences of E2E), the two ways taking turns.

`all` is the way that models take whose tail looks around: what everybody did before.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from report import header, save, table

ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "base"
MIB, SEED, ROWS, RANK = 2**20, 0, 8, 8
VOCAB, HIDDEN, TOKENS = 151_936, 896, 512
WAYS = ("all", "targets")
# Share of the tokens that are targets: all of plain text, and what E2E has.
SHARES = {"every token": 1.0, "a third": 1 / 3}


@contextmanager
def way(name: str) -> Iterator[None]:
    """Let every tail run on all positions, or only where there is a target."""
    from edge_sdk.model.partition import Slice

    if name == "all":
        with mock.patch.object(Slice, "has_local_tail", False):
            yield
    else:
        yield


def columns(data: Path, limit: int) -> dict[str, Any]:
    """E2E as prompt and completion."""
    return {
        "path": str(data / "e2e" / "trainset.csv"),
        "columns": {"prompt": "mr", "completion": "ref"},
        "limit": limit,
    }


# ---- bytes ----


def count_bytes(name: str, data: Path, steps: int) -> dict[str, int]:
    """Return the bytes of each kind of message in a simulated run with `labels: device`."""
    from coordinator.config.run import DeviceSettings
    from coordinator.lab.simulation import run
    from coordinator.lab.simulation.config import (
        FleetConfig,
        SimulatedDeviceConfig,
        SimulationConfig,
    )
    from coordinator.lab.simulation.timing import ClockListener
    from coordinator.results.watchers import Watchers
    from edge_sdk.data.rows import DataConfig

    found: Counter[str] = Counter()

    class Counting(ClockListener):
        """Adds up what travels."""

        def up(self, device: str, message: Any, num_bytes: int) -> None:
            found[type(message).__name__] += num_bytes
            super().up(device, message, num_bytes)

        def down(self, device: str, message: Any, num_bytes: int) -> None:
            found[type(message).__name__] += num_bytes
            super().down(device, message, num_bytes)

    with tempfile.TemporaryDirectory() as folder, way(name):
        config = SimulationConfig(
            model=str(BASE),
            runs=Path(folder),
            labels="device",
            rounds=1,
            steps_per_round=steps,
            default=DeviceSettings(batch_size=ROWS, codec="bfloat16"),
            devices={f"d{split}": DeviceSettings(split=split) for split in (2, 3, 4)},
            simulation=FleetConfig(
                data=DataConfig(**columns(data, 300)),
                devices={f"d{split}": SimulatedDeviceConfig() for split in (2, 3, 4)},
            ),
        )
        with mock.patch.object(run, "ClockListener", Counting):
            run.simulate(config, Watchers([]))
    return dict(found)


def bytes_table(data: Path, steps: int) -> str:
    """Return a table of both ways."""
    kinds = ("Activation", "TopHidden", "TopGradient", "Gradient")
    both = {name: count_bytes(name, data, steps) for name in WAYS}
    rows = []
    for label, chosen in (*((k, (k,)) for k in kinds), ("together", kinds)):
        before, after = (sum(both[name][kind] for kind in chosen) for name in WAYS)
        rows.append((label, f"{before:,}", f"{after:,}", f"{after / before:.3f}"))
    return table(("message", "all: bytes", "targets: bytes", "ratio"), rows)


# ---- head ----


def measure_head(name: str, share: float) -> dict[str, float]:
    """Return peak bytes over what lies there, and CPU seconds, of one pass both ways."""
    import torch
    from transformers import AutoConfig

    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.loss import IGNORED, loss_sums, target_sums
    from edge_sdk.model.partition import Slice
    from profiler.sensors.memory import peak_rss, reset_peak_rss, return_freed, rss

    torch.manual_seed(SEED)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    config.use_cache = False
    layout = find_layout(config, "causal-lm")
    slice_ = Slice(config, "causal-lm", layout, torch.float32)
    shapes = {n: t.shape for n, t in slice_.model.state_dict().items()}
    for part in ("front", "tail"):
        slice_.add(part, {n: torch.randn(shapes[n]).mul_(0.02) for n in layout.part(part)})
    hidden_BTD = torch.randn(1, TOKENS, HIDDEN).requires_grad_(True)
    labels_BT = torch.randint(0, VOCAB, (1, TOKENS))
    labels_BT[:, : round(TOKENS * (1 - share))] = IGNORED
    assert slice_.has_local_tail
    gc.collect()
    return_freed()
    reset_peak_rss()
    before, began = rss().value or 0, time.process_time()
    if name == "all":
        logits = slice_.logits(hidden_BTD, torch.tensor([TOKENS]), layout.num_blocks)
        sums = loss_sums(logits, labels_BT)
        del logits
    else:
        sums = target_sums(slice_, hidden_BTD, labels_BT)
    loss = sums.loss_B.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden_BTD.grad is not None
    return {
        "peak": (peak_rss().value or 0) - before,
        "cpu_s": time.process_time() - began,
        "loss": float(loss.detach()),
        "gradient": float(hidden_BTD.grad.norm()),
    }


def head_table() -> str:
    """Return a table of both ways, and of the estimate."""
    rows = []
    for label, share in SHARES.items():
        found = {name: in_a_process(name, share) for name in WAYS}
        before, after = (found[name] for name in WAYS)
        off = max(abs(after[key] / before[key] - 1) for key in ("loss", "gradient"))
        rows.append(
            (
                label,
                *(f"{one['peak'] / MIB:.0f} MiB" for one in (before, after)),
                *(f"{one['cpu_s']:.2f} s" for one in (before, after)),
                f"{off:.0e}" if off else "none",
            )
        )
    heads = ("targets", "all: peak", "targets: peak", "all: CPU", "targets: CPU", "difference")
    return table(heads, rows)


def in_a_process(name: str, share: float) -> dict[str, float]:
    """Measure a head in a process that has done nothing else."""
    command = [sys.executable, __file__, "--role", name, "--share", str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- step ----


def make_runtime() -> Any:
    """All blocks and the head of examples/base, as a device that trains alone has them."""
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.weights import ModelSource
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.torch_runtime import TorchRuntime
    from edge_sdk.runtime.training import TrainingConfig

    source = ModelSource(str(BASE), "causal-lm")
    source.load_whole(SEED)
    layout, lora = source.layout, LoraConfig(r=RANK)
    ranks = dict.fromkeys(find_targets(source.config, "causal-lm", layout, lora), RANK)
    plan = Plan(
        split=layout.num_blocks,
        ranks=ranks,
        alphas={},
        batch_size=ROWS,
        micro_batch=ROWS,
        tail=True,
    )
    parts = {name: source.tensors(name) for name in layout.part_names()}
    training = TrainingConfig(learning_rate=2e-4, seed=SEED)
    return TorchRuntime(
        source.config, "causal-lm", layout, parts, plan, lora, training, 10_000, device="cpu"
    )


def step_table(data: Path, repeats: int) -> str:
    """Return a table of medians; both ways see the same batches, one after the other."""
    from transformers import AutoTokenizer

    from edge_sdk.data.batches import Batches
    from edge_sdk.data.rows import DataConfig, load_rows
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows

    config = DataConfig(**columns(data, 300))
    limits = ModelLimits(vocab_size=4096, max_positions=512)
    rows = load_rows(None, config)
    examples = tokenize_rows(rows, AutoTokenizer.from_pretrained(BASE), config, limits)
    batches = Batches(examples, ROWS, ROWS, SEED, "device")
    runtimes = {name: make_runtime() for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    targets = tokens = 0
    for step in range(3 + repeats):
        batch = batches.at(step)
        (micro,) = batch.micro_batches
        targets, tokens = targets + batch.num_targets, tokens + micro.input_ids.size
        for name in WAYS:
            with way(name):
                began = time.process_time()
                runtimes[name].local(micro, batch.num_targets, step, 0)
                runtimes[name].step(step)
                seconds[name].append(time.process_time() - began)
    before, after = (statistics.median(seconds[name][3:]) for name in WAYS)
    cells = (f"{targets / tokens:.2f}", f"{before * 1e3:.0f} ms", f"{after * 1e3:.0f} ms")
    heads = ("targets of all positions", "all: CPU of a step", "targets: CPU of a step", "ratio")
    return table(heads, [(*cells, f"{after / before:.3f}")])


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="of the run whose bytes are counted")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--role", default="", choices=["", *WAYS])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if options.role:
        print(json.dumps(measure_head(options.role, options.share)))
        return
    shown = argparse.Namespace(steps=options.steps, repeats=options.repeats)
    text = "\n\n".join(
        (
            header("Tail only where there is a target", shown),
            "## Bytes with `labels: device`\n\n" + bytes_table(options.data, options.steps),
            f"## Norm, head and loss of {TOKENS} tokens, {VOCAB:,} words\n\n" + head_table(),
            "## A step\n\n" + step_table(options.data, options.repeats),
        )
    )
    if options.no_write:
        print(text)
    else:
        save("targets", text)


if __name__ == "__main__":
    main()
