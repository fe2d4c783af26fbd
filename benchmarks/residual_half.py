"""What bfloat16 weights lose of a residual that is added to them, beside one that stands apart.

    python benchmarks/residual_half.py [--steps 100] [--rate 2e-3]

examples/base, a Llama stored in bfloat16, learns E2E in float32 with rank 8 on all linear layers.
What it has learned after some steps is then a frozen residual, and the same held-out rows go
through the model in float32, and in bfloat16 with the residual beside the weights and inside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL, E2E = ROOT / "examples" / "base", ROOT.parent / "shared" / "data" / "e2e"
BATCH, RANK, SEED, HELD_OUT = 8, 8, 0, 64
MOMENTS = (5, 25, 100)


def examples_of(name: str, limit: int, tokenizer: Any) -> Any:
    """E2E as prompt and completion, in tokens."""
    from edge_sdk.data.rows import DataConfig, load_rows
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows

    columns = {"prompt": "mr", "completion": "ref"}
    config = DataConfig(path=str(E2E / name), columns=columns, limit=limit)
    limits = ModelLimits(vocab_size=len(tokenizer), max_positions=256)
    return tokenize_rows(load_rows(None, config), tokenizer, config, limits)


def learn(source: Any, steps: int, rate: float, tokenizer: Any) -> dict[int, Mapping[str, Any]]:
    """Return what adapters add to the weights after some steps."""
    from edge_sdk.data.batches import Batches
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.torch_runtime import TorchRuntime
    from edge_sdk.runtime.training import TrainingConfig

    lora, layout = LoraConfig(r=RANK), source.layout
    shapes = find_targets(source.config, "causal-lm", layout, lora)
    plan = Plan(
        split=layout.num_blocks,
        ranks=dict.fromkeys(shapes, RANK),
        alphas={},
        batch_size=BATCH,
        micro_batch=BATCH,
        tail=True,
    )
    parts = {name: source.tensors(name) for name in layout.part_names()}
    training = TrainingConfig(learning_rate=rate, lr_scheduler_type="constant")
    runtime = TorchRuntime(
        source.config, "causal-lm", layout, parts, plan, lora, training, steps, device="cpu"
    )
    batches = Batches(examples_of("trainset.csv", 1000, tokenizer), BATCH, BATCH, SEED, "device")
    found = {}
    for step in range(steps):
        (micro,) = batches.at(step).micro_batches
        targets = int((micro.labels[:, 1:] != -100).sum())
        runtime.local(micro, targets, step, 0)
        runtime.step(step)
        if step + 1 in MOMENTS:
            found[step + 1] = runtime.state.adapters.products()
    return found


def answers(
    source: Any, residual: Mapping[str, Any], batches: list[Any], dtype: Any, *, folds: bool
) -> tuple[float, Any]:
    """Return the mean loss on held-out rows, and the logits of their real tokens."""
    import torch

    from edge_sdk.lora.adapters import Adapters
    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.model.loss import loss_sums
    from edge_sdk.model.partition import Slice
    from edge_sdk.model.precision import autocast

    slice_ = Slice(source.config, "causal-lm", source.layout, dtype)
    for name in source.layout.part_names():
        slice_.add(name, source.tensors(name))
    Adapters(slice_, {}, {}, LoraConfig(), folds=folds).set_residual(residual)
    slice_.model.eval()
    loss, targets, logits = 0.0, 0, []
    with torch.no_grad(), autocast(dtype, slice_.device):
        for micro in batches:
            ids, lengths, labels = (torch.from_numpy(x) for x in micro[:3])
            out = slice_.whole(ids, lengths).float()
            sums = loss_sums(out, labels)
            loss += float(sums.loss_B.sum())
            targets += int(sums.targets_B.sum())
            real = torch.arange(ids.shape[1])[None] < lengths[:, None]
            logits.append(out[real])
    return loss / targets, torch.cat(logits)


def lost(source: Any, residual: Mapping[str, Any]) -> float:
    """Return the share of the residual that rounding takes away, by Frobenius norms."""
    import torch

    off = size = 0.0
    names = {n: part for part in source.layout.part_names() for n in source.layout.part(part)}
    for name, factors in residual.items():
        weight = source.tensors(names[f"{name}.weight"])[f"{name}.weight"].float()
        change = torch.from_numpy(factors.dense())
        off += float((((weight + change).bfloat16().float() - weight) - change).pow(2).sum())
        size += float(change.pow(2).sum())
    return (off / size) ** 0.5


def measure(options: argparse.Namespace) -> str:
    """Compare at each moment and return the report."""
    import torch
    from report import header, table

    from edge_sdk.data.batches import eval_batches
    from edge_sdk.model.weights import ModelSource, load_tokenizer

    torch.set_num_threads(1)
    source = ModelSource(str(MODEL), "causal-lm")
    tokenizer = load_tokenizer(MODEL)
    batches = list(eval_batches(examples_of("devset.csv", HELD_OUT, tokenizer), BATCH, pad_id=0))
    rows = []
    start, _ = answers(source, {}, batches, torch.float32, folds=False)
    for step, residual in learn(source, options.steps, options.rate, tokenizer).items():
        exact, due = answers(source, residual, batches, torch.float32, folds=False)
        scale = float(due.abs().mean())
        for form, folds in (("beside, low rank", False), ("inside, rounded", True)):
            loss, logits = answers(source, residual, batches, torch.bfloat16, folds=folds)
            off = float((logits - due).abs().mean()) / scale
            taken = f"{lost(source, residual):.1%}" if folds else "0"
            gained = (loss - exact) / (start - exact)
            rows.append(
                (step, form, taken, f"{exact:.4f}", f"{loss:.4f}", f"{gained:+.2%}", f"{off:.2%}")
            )
    heads = (
        "steps",
        "residual",
        "of it lost",
        "NLL float32",
        "NLL bfloat16",
        "of what was learned",
        "logits off by",
    )
    return "\n\n".join(
        [
            header("A residual inside bfloat16 weights", options),
            f"examples/base, E2E, {HELD_OUT} held-out rows; NLL at the start {start:.4f}. `of what "
            "was learned`: by how much the loss is higher than in float32, as a share of what "
            "training has taken off; `logits off by`: mean difference over mean size.",
            table(heads, rows),
        ]
    )


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=MOMENTS[-1])
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--no-write", action="store_true", help="print the report alone")
    options = parser.parse_args()
    text = measure(options)
    if options.no_write:
        print(text)
        return
    from report import save

    save("residual-half", text)


if __name__ == "__main__":
    main()
