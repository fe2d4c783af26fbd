"""Memory and time of benchmarks/quantized.py: a random Llama, all blocks on the device."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

RANK, LENGTH, TIMED, SKIPPED = 8, 128, 6, 1


def large_config(blocks: int) -> Any:
    """A Llama whose blocks are nearly all of it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
    )


def write_parts(folder: Path, blocks: int) -> None:
    """The parts of a random model, one after the other."""
    import torch
    from safetensors.torch import save_file

    from edge_sdk.model.layout import build_empty, find_layout

    config = large_config(blocks)
    layout = find_layout(config, "causal-lm")
    shapes = {
        n: p.shape for n, p in build_empty(config, "causal-lm", torch.float32).state_dict().items()
    }
    torch.manual_seed(0)
    for part in layout.part_names():
        tensors = {
            n: torch.randn(shapes[n]) * 0.02 if len(shapes[n]) > 1 else torch.ones(shapes[n])
            for n in layout.part(part)
        }
        save_file(tensors, folder / f"{part}.safetensors")


def memory(folder: Path, base: str, blocks: int) -> dict[str, Any]:
    """Build a device with all blocks from its part files, train a few steps, and look."""
    import numpy as np
    import peft  # noqa: F401 - part of the import floor
    import torch

    from edge_sdk.data.batches import MicroBatch
    from edge_sdk.lora.targets import LoraConfig, find_targets
    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.weights import open_part
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.torch_runtime import TorchRuntime
    from edge_sdk.runtime.training import TrainingConfig
    from profiler.sensors.memory import peak_rss, reset_peak_rss, rss

    config = large_config(blocks)
    layout = find_layout(config, "causal-lm")
    lora = LoraConfig(r=RANK)
    ranks = dict.fromkeys(find_targets(config, "causal-lm", layout, lora), RANK)
    plan = Plan(split=blocks, ranks=ranks, alphas={}, batch_size=1, micro_batch=1, tail=True)
    is_streamed = base != "float32"
    files = {n: folder / f"{n}.safetensors" for n in layout.part_names()}
    parts = {n: open_part(path, is_streamed=is_streamed) for n, path in files.items()}
    floor = rss().value or 0
    reset_peak_rss()
    began = time.perf_counter()
    runtime = TorchRuntime(
        config,
        "causal-lm",
        layout,
        parts,
        plan,
        lora,
        TrainingConfig(),
        100,
        device="cpu",
        base=base,
    )
    built_s, loaded = time.perf_counter() - began, (peak_rss().value or 0) - floor
    del parts
    ids = np.random.default_rng(0).integers(0, 4096, (1, LENGTH))
    micro = MicroBatch(ids, np.full(1, LENGTH, np.int32), ids)
    cpu, wall = [], []
    for step in range(SKIPPED + TIMED):
        began, spent = time.perf_counter(), time.process_time()
        runtime.local(micro, LENGTH - 1, step, 0)
        runtime.step(step)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - spent)
    return {
        "floor": floor,
        "loaded": loaded,
        "resident": (rss().value or 0) - floor,
        "peak": (peak_rss().value or 0) - floor,
        "built_s": built_s,
        "cpu_s": statistics.median(cpu[SKIPPED:]),
        "wall_s": statistics.median(wall[SKIPPED:]),
        "threads": torch.get_num_threads(),
    }


def base_bytes(base: str, blocks: int) -> int:
    """Bytes of the blocks' weights as *base* keeps them."""
    import torch

    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.partition import CPU, Slice
    from edge_sdk.model.quantized import resolve_base

    config = large_config(blocks)
    dtype, kind = resolve_base(base, torch.float32)  # type: ignore[arg-type]
    slice_ = Slice(config, "causal-lm", find_layout(config, "causal-lm"), dtype, CPU, kind)
    return sum(p.nbytes for block in slice_.blocks for p in block.parameters())


def predicted(base: str, blocks: int) -> int:
    """Peak that the planner reckons with."""
    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.precision import LINEAR_BYTES
    from edge_sdk.model.shape import model_shape
    from profiler.estimate.memory import estimate_memory
    from profiler.estimate.sizes import Work

    config = large_config(blocks)
    shape = model_shape(config, "causal-lm", find_layout(config, "causal-lm"))
    ranks = {
        f"{shape.blocks_path}.{i}.{li.name}": RANK for i in range(blocks) for li in shape.linears
    }
    work = Work(
        first=0,
        stop=blocks,
        has_front=True,
        has_tail=True,
        ranks=ranks,
        micro_batch=1,
        length=LENGTH,
        linear_bytes=LINEAR_BYTES.get(base),  # type: ignore[call-overload]
    )
    estimate = estimate_memory(shape, work)
    print(base, estimate, file=sys.stderr)
    return estimate.total
