"""What the frozen residual costs a step: folded into the weights, beside them, and not there.

    python benchmarks/residual.py [--steps 15] [--blocks 4] [--onnx]

A Llama-shaped stack, 768 wide, all linear layers adapted, AdamW, one thread. Five devices of ranks
4 to 64 share the run; the step of the first and of the last of them is timed in round 1, without a
residual, and in round 20, with one of all their ranks. Every turn does one step of each variant,
plain PEFT first, so that whatever else the machine does meets all of them: a ratio is that of two
steps of one turn. What folding takes once a round stands in a line of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

RANKS = (4, 8, 16, 32, 64)
BATCH, LENGTH, VOCAB, SKIPPED, SEED = 4, 128, 2048, 3, 0
PLAIN = "plain PEFT"


def make_model(blocks: int) -> Any:
    """A Llama of so many blocks, random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=blocks,
        num_attention_heads=12,
        num_key_value_heads=4,
        use_cache=False,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def make_micro() -> Any:
    """A micro-batch without padding, every token a target."""
    import numpy as np

    from edge_sdk.data.batches import MicroBatch

    ids = np.random.default_rng(SEED).integers(1, VOCAB, (BATCH, LENGTH)).astype(np.int64)
    return MicroBatch(ids, np.full(BATCH, LENGTH, np.int32), ids)


def learned(shapes: Mapping[str, Any], own: int) -> dict[str, Any]:
    """What a device of rank *own* holds frozen once every device has learned something."""
    import numpy as np

    from edge_sdk.lora.factors import Factors, compress, stack

    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        draw = np.random.default_rng(number)
        terms = []
        for rank in RANKS:
            down, up = (draw.normal(0, 0.01, size) for size in shape.factors(rank))
            # dW holds a fifth of what this device has learned; the rest of it is in its adapter.
            share = 1 / len(RANKS) - (rank == own)
            terms.append(Factors((share * up).astype(np.float32), down.astype(np.float32)))
        found[name] = compress(stack(terms))[0]
    return found


def give_residual(runtime: Any, shapes: Mapping[str, Any], rank: int) -> float:
    """Let a device of rank *rank* hold what `learned` says; return the seconds that it took."""
    residual = learned(shapes, rank)
    began = time.process_time()
    runtime.state.set_residual(residual)
    return time.process_time() - began


def plain_step(model: Any, rank: int) -> Callable[[int], None]:
    """Return a step of plain PEFT."""
    import peft
    import torch

    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear")
    network = peft.get_peft_model(model, config).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    micro = make_micro()
    ids, labels = (torch.from_numpy(x).long() for x in (micro.input_ids, micro.labels))
    mask = torch.ones_like(ids)

    def step(_: int) -> None:
        network(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_step(
    model: Any, rank: int, form: str, *, has_residual: bool
) -> tuple[Callable[[int], None], float]:
    """Return a step of a device that holds the whole model, and seconds to take a residual in."""
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.layout import find_layout
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.torch_runtime import TorchRuntime
    from edge_sdk.runtime.training import TrainingConfig

    layout, lora = find_layout(model.config, "causal-lm"), LoraConfig(r=rank)
    shapes = find_targets(model.config, "causal-lm", layout, lora)
    state = model.state_dict()
    parts = {name: {n: state[n] for n in layout.part(name)} for name in layout.part_names()}
    plan = Plan(
        split=layout.num_blocks,
        ranks=dict.fromkeys(shapes, rank),
        alphas={},
        batch_size=BATCH,
        micro_batch=BATCH,
        tail=True,
        residual=form,
    )
    training = TrainingConfig(learning_rate=1e-4)
    runtime = TorchRuntime(
        model.config, "causal-lm", layout, parts, plan, lora, training, 1000, device="cpu"
    )
    seconds = give_residual(runtime, shapes, rank) if has_residual else 0.0
    micro = make_micro()
    targets = BATCH * (LENGTH - 1)

    def step(number: int) -> None:
        runtime.local(micro, targets, number, 0)
        runtime.step(number)

    return step, seconds


def onnx_step(
    model: Any, rank: int, form: str, *, has_residual: bool
) -> tuple[Callable[[int], None], float]:
    """Return the same on onnxruntime: both passes and the update of all blocks, without a tail."""
    import numpy as np

    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.layout import find_layout
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.onnx_runtime import OnnxRuntime
    from edge_sdk.runtime.training import TrainingConfig

    layout, lora = find_layout(model.config, "causal-lm"), LoraConfig(r=rank)
    shapes = find_targets(model.config, "causal-lm", layout, lora)
    parts = mapped_parts(model, layout)
    plan = Plan(
        split=layout.num_blocks,
        ranks=dict.fromkeys(shapes, rank),
        alphas={},
        batch_size=BATCH,
        micro_batch=BATCH,
        residual=form,
    )
    graphs = graphs_of(layout.num_blocks)
    training = TrainingConfig(learning_rate=1e-4)
    runtime = OnnxRuntime(graphs, parts, plan, lora, training, 1000, threads=1)
    seconds = give_residual(runtime, shapes, rank) if has_residual else 0.0
    micro = make_micro()
    grad = np.full((BATCH, LENGTH, model.config.hidden_size), 1e-3, np.float32)

    def step(number: int) -> None:
        runtime.forward(micro, number, 0)
        runtime.backward(grad)
        runtime.step(number)

    return step, seconds


@cache
def graphs_of(blocks: int) -> Any:
    """What the coordinator would send; ranks are symbols in it."""
    from coordinator.onnx_export.export import export_slice
    from coordinator.onnx_export.job import ExportJob
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.layout import find_layout

    config = make_model(blocks).config
    layout = find_layout(config, "causal-lm")
    names = [n for part in layout.part_names() for n in layout.part(part)]
    job = ExportJob(
        task="causal-lm",
        num_labels=0,
        split=blocks,
        tail=False,
        measures=False,
        targets=find_targets(config, "causal-lm", layout, LoraConfig()),
        dtypes=dict.fromkeys(names, "float32"),
    )
    return export_slice(config, job, layout)


def mapped_parts(model: Any, layout: Any) -> dict[str, Any]:
    """Embeddings and blocks of a model as a device without torch has them."""
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file

    from edge_sdk.model.safetensors_files import map_part

    state, parts = model.state_dict(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("front", *(f"block.{i}" for i in range(layout.num_blocks))):
            path = Path(scratch) / f"{name}.safetensors"
            save_file({n: state[n].contiguous() for n in layout.part(name)}, path)
            parts[name] = map_part(path)
    return parts


def measure(options: argparse.Namespace) -> str:
    """Time all variants in turn and return the report."""
    import torch
    from report import header, table

    torch.set_num_threads(1)
    rows = []
    for rank in (RANKS[0], RANKS[-1]):
        steps: dict[str, Callable[[int], None]] = {
            PLAIN: plain_step(make_model(options.blocks), rank)
        }
        once = {PLAIN: 0.0}
        variants = {
            "round 1": ("auto", False),
            "round 20, folded": ("auto", True),
            "round 20, low-rank": ("low-rank", True),
        }
        if options.onnx:
            steps, once = {}, {}
            variants["round 1, inputs for a residual"] = ("low-rank", False)
        make = onnx_step if options.onnx else own_step
        for name, (form, has_residual) in variants.items():
            model = make_model(options.blocks)
            steps[name], once[name] = make(model, rank, form, has_residual=has_residual)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(options.steps + SKIPPED):
            for name, step in steps.items():
                began = time.process_time()
                step(turn)
                seconds[name].append(time.process_time() - began)
        timed = {name: own[SKIPPED:] for name, own in seconds.items()}
        for name, own in timed.items():
            bases = ("round 1" if options.onnx else PLAIN, "round 1")
            to_plain, to_first = (ratios(own, timed[base]) for base in bases)
            spread = f"{min(own):.3f}-{max(own):.3f}"
            median = f"{statistics.median(own):.3f}"
            rows.append((rank, name, median, spread, to_plain, to_first, f"{once[name]:.2f}"))
    heads = ("r", "what", "CPU s/step", "min-max", "x plain", "x round 1", "s once a round")
    return "\n\n".join(
        [
            header("A step with a frozen residual", options),
            f"Llama-shaped, {options.blocks} blocks, 768 wide, vocabulary {VOCAB}, all linear "
            f"layers, {BATCH} x {LENGTH} tokens a step, float32, one thread. Devices of ranks "
            f"{', '.join(map(str, RANKS))}: the residual has {sum(RANKS)} ranks. Medians, and "
            "medians of the ratios of each turn. Target: at most 1.03 x round 1.",
            table(heads, rows),
        ]
    )


def ratios(own: list[float], base: list[float]) -> str:
    """The median of the ratios, turn by turn."""
    return f"{statistics.median(a / b for a, b in zip(own, base, strict=True)):.3f}"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--onnx", action="store_true", help="blocks alone, on onnxruntime")
    parser.add_argument("--no-write", action="store_true", help="print the report alone")
    options = parser.parse_args()
    text = measure(options)
    if options.no_write:
        print(text)
        return
    from report import save

    save("residual-onnx" if options.onnx else "residual", text)


if __name__ == "__main__":
    main()
