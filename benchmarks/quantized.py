"""What int8 and int4 base weights cost and save: memory, time, and the loss that is reached.

    OMP_NUM_THREADS=1 python benchmarks/quantized.py [--steps 200] [--seeds 2] [--blocks 16]

Memory and time: a random Llama of `--blocks` blocks x 1024 (about 67 MB each in float32, written
block by block), all blocks on the device's real runtime, built from part files as a device builds
it; each base in a process of its own, its peak resident size less that of the same process after
its imports. Loss: the project's base model, all 8 blocks quantised, E2E, LoRA r = 8 on every linear
layer, AdamW; each base sees the same batches and starts from the same factors. Error: of the
weights of the base model's blocks, by the code that a device quantises with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantized_memory import LENGTH, RANK, TIMED, base_bytes, memory, predicted, write_parts

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "base"
E2E = ROOT.parent / "shared" / "data" / "e2e"
BASES = ("float32", "int8", "int4")
BATCH, RATE, TRAIN, DEV = 4, 2e-3, 800, 100


# ---- loss ----------------------------------------------------------------------------------------


def loss(base: str, steps: int, seed: int) -> dict[str, Any]:
    """Train the whole base model on E2E and return dev NLL per token, before and after."""
    from edge_sdk.data.batches import Batches, eval_batches
    from edge_sdk.data.rows import DataConfig, load_rows
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
    from edge_sdk.lora.adapters import initial_pair
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.weights import ModelSource, load_tokenizer
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.torch_runtime import TorchRuntime
    from edge_sdk.runtime.training import TrainingConfig

    source = ModelSource(str(MODEL), "causal-lm", is_streamed=base != "float32")
    tokenizer, layout = load_tokenizer(MODEL), source.layout
    limits = ModelLimits(vocab_size=source.config.vocab_size, max_positions=512)

    def examples(name: str, limit: int) -> list[Any]:
        columns = {"prompt": "mr", "completion": "ref"}
        config = DataConfig(path=str(E2E / name), columns=columns, limit=limit)
        return tokenize_rows(load_rows(None, config), tokenizer, config, limits)

    lora = LoraConfig(r=RANK)
    targets = find_targets(source.config, "causal-lm", layout, lora)
    plan = Plan(
        split=layout.num_blocks,
        ranks=dict.fromkeys(targets, RANK),
        alphas={},
        batch_size=BATCH,
        micro_batch=BATCH,
        tail=True,
    )
    training = TrainingConfig(learning_rate=RATE, seed=seed)
    parts = {name: source.tensors(name) for name in layout.part_names()}
    runtime = TorchRuntime(
        source.config,
        "causal-lm",
        layout,
        parts,
        plan,
        lora,
        training,
        steps,
        device="cpu",
        base=base,
    )
    runtime.state.adapters.load_pairs(
        {n: initial_pair(n, RANK, s, seed) for n, s in targets.items()}
    )
    pad = source.config.pad_token_id or 0
    dev = list(eval_batches(examples("devset.csv", DEV), 32))

    def nll() -> float:
        sums = [runtime.tail_eval(runtime.forward_eval(micro), micro) for micro in dev]
        return sum(s.loss_sum for s in sums) / sum(s.num_targets for s in sums)

    before = nll()
    stream = Batches(examples("trainset.csv", TRAIN), BATCH, BATCH, seed, "device", pad_id=pad)
    for step in range(steps):
        batch = stream.at(step)
        for index, micro in enumerate(batch.micro_batches):
            runtime.local(micro, batch.num_targets, step, index)
        runtime.step(step)
    return {"before": before, "after": nll()}


def errors() -> list[tuple[str, str, str]]:
    """Root mean square error of the block weights, relative to them, and bits for each."""
    import torch

    from edge_sdk.model import quantized
    from edge_sdk.model.weights import ModelSource

    source = ModelSource(str(MODEL), "causal-lm")
    parts = (source.tensors(f"block.{i}") for i in range(source.layout.num_blocks))
    weights = [w.float() for part in parts for w in part.values() if w.dim() == 2]

    def row(name: str, pieces: list[tuple[Any, Any, Any]], num_scale_bits: int) -> Any:
        wrong = sum(float((found - w).square().sum()) for w, found, _ in pieces)
        right = sum(float(w.square().sum()) for w, _, _ in pieces)
        codes = 4 if "int4" in name else 8
        bits = codes + num_scale_bits * sum(s.numel() for *_, s in pieces) / sum(
            w.numel() for w, _, _ in pieces
        )
        return name, f"{bits:.2f}", f"{100 * (wrong / right) ** 0.5:.2f} %"

    def ours(kind: Any) -> list[tuple[Any, Any, Any]]:
        packed = [(w, *quantized.pack(w, kind)) for w in weights]
        return [(w, quantized.unpack(c, s, w.shape[1]), s) for w, c, s in packed]

    def even(w: torch.Tensor, group: int) -> tuple[Any, Any, Any]:
        """What would be without the sign in the scale: -7 .. 7."""
        grouped = w.reshape(w.shape[0], -1, group)
        scale = (grouped.abs().amax(2, keepdim=True) / 7).bfloat16()
        found = (grouped / scale.float()).round().clamp(-7, 7) * scale.float()
        return w, found.reshape(w.shape), scale

    rows = [row("int8, a scale per output", ours("int8"), 32)]
    for group in (32, 64, 128):
        quantized.GROUP = group
        rows.append(row(f"int4, groups of {group}", ours("int4"), 16))
        rows.append(row(f"int4, groups of {group}, -7..7", [even(w, group) for w in weights], 16))
    return rows


# ---- report --------------------------------------------------------------------------------------


# Every tensor above 128 KiB in pages of its own, none in the heap, where activations leave holes.
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def run(role: str, settings: dict[str, str] | None = None, **flags: object) -> dict[str, Any]:
    """Run this file as another process in *role* and read its last line."""
    command = [sys.executable, __file__, f"--role={role}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    env = {
        **os.environ,
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        **(settings or {}),
    }
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True).stdout
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    print(role, settings, flags, found, file=sys.stderr, flush=True)
    return found


def memory_tables(blocks: int) -> tuple[str, str]:
    """Measure each base in a process of its own."""
    from report import table

    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), blocks)
        flags = {"folder": folder, "blocks": blocks}
        found = {base: run("memory", base=base, **flags) for base in BASES}
        bare = {base: run("memory", NO_HEAP, base=base, **flags) for base in BASES}
    first, plain = found["float32"], bare["float32"]["peak"]
    sizes = {base: base_bytes(base, blocks) for base in BASES}
    memory_rows = [
        (
            base,
            f"{sizes[base] / 2**20:.0f}",
            f"{f['loaded'] / 2**20:.0f}",
            f"{f['peak'] / 2**20:.0f}",
            f"{f['peak'] / first['peak']:.3f}",
            f"{predicted(base, blocks) / 2**20:.0f}",
            f"{bare[base]['peak'] / 2**20:.0f}",
            f"{bare[base]['peak'] / plain:.3f}",
            f"{f['floor'] / 2**20:.0f}",
        )
        for base, f in found.items()
    ]
    time_rows = [
        (
            base,
            f"{f['built_s']:.1f}",
            f"{f['cpu_s'] * 1e3:.0f}",
            f"{f['cpu_s'] / first['cpu_s']:.3f}",
            f"{f['wall_s'] * 1e3:.0f}",
        )
        for base, f in found.items()
    ]
    heads = ("base", "blocks' weights MiB", "peak while loading MiB", "peak with training MiB")
    return (
        table(
            (
                *heads,
                "of float32",
                "predicted MiB",
                "peak, no heap MiB",
                "of float32",
                "import floor MiB",
            ),
            memory_rows,
        ),
        table(("base", "built in s", "step, CPU ms", "of float32", "step, wall ms"), time_rows),
    )


def loss_table(steps: int, seeds: int) -> str:
    """The same training on each base."""
    from report import table

    found = {
        base: [run("loss", base=base, steps=steps, seed=seed) for seed in range(seeds)]
        for base in BASES
    }
    rows = []
    for base, runs in found.items():
        after = [f["after"] for f in runs]
        more = [a / f["after"] - 1 for a, f in zip(after, found["float32"], strict=True)]
        rows.append(
            (
                base,
                f"{runs[0]['before']:.4f}",
                f"{statistics.mean(after):.4f}",
                f"{min(after):.4f}-{max(after):.4f}",
                f"{statistics.mean(more):+.2%}",
                f"{min(more):+.2%} .. {max(more):+.2%}",
            )
        )
    heads = ("base", "dev NLL before", f"after {steps} steps", "min-max")
    return table((*heads, "against float32, same seed", "min .. max"), rows)


def measure(options: argparse.Namespace) -> str:
    """Run everything and return the report."""
    from report import header, table

    memory_table, time_table = memory_tables(options.blocks)
    return "\n\n".join(
        [
            header("Quantised base weights", options),
            f"Random Llama, {options.blocks} blocks x 1024 (MLP 4096), all of them on the device, "
            f"r = {RANK} on every linear layer, float32 products, 1 x {LENGTH} tokens a step. Peak "
            "resident size above the import floor; clean pages of the mapped files count. `no "
            "heap`: with MALLOC_MMAP_THRESHOLD_=131072 in the environment.",
            memory_table,
            f"The same runs: medians of {TIMED} steps, forward, backward and AdamW; CPU time is "
            "the process's own. `float32` is mapped from its files, nothing is read to build it.",
            time_table,
            f"Base model (8 blocks x 128), all blocks quantised, {BATCH} E2E pairs a step, r = "
            f"{RANK}, AdamW {RATE:g}, linear decay; {DEV} dev pairs, NLL per token of the "
            f"completion; {options.seeds} seeds.",
            loss_table(options.steps, options.seeds),
            "Error of the base model's block weights, root mean square over that of the weights.",
            table(("kept as", "bits for a weight", "error"), errors()),
        ]
    )


def main() -> None:
    """Dispatch on the role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=16)
    options = parser.parse_args()
    if options.role == "memory":
        print(json.dumps(memory(options.folder, options.base, options.blocks)))
    elif options.role == "loss":
        print(json.dumps(loss(options.base, options.steps, options.seed)))
    else:
        from report import save

        save("quantized", measure(options))


if __name__ == "__main__":
    main()
