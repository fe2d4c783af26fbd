"""The device's side of benchmarks/memory.py: build the slice, train, see how much memory it took.

Imports nothing heavy by itself: a device without torch must be measured without torch.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_cases import Case


def train(case: Case, folder: Path, facts: dict[str, Any], steps: int) -> dict[str, Any]:
    """Be the device: build the slice, train, and say how much memory that took at most."""
    is_torch = case.kind != "onnxruntime"
    if is_torch:
        import peft  # noqa: F401 - part of the import floor
        from transformers import AutoConfig, AutoModel  # noqa: F401
    else:
        import edge_sdk.runtime.onnx_runtime  # noqa: F401
    from profiler.sensors.memory import peak_rss, reset_peak_rss, rss

    floor = rss().value or 0
    reset_peak_rss()
    make = torch_runtime if is_torch else onnx_runtime
    runtime = make(case, folder, facts, steps)
    set_residual(runtime, case)
    runtime.state.begin_round()
    seconds = [train_step(runtime, case, facts, i, steps) for i in range(steps)]
    peak = (peak_rss().value or 0) - floor
    return {"peak": peak, "floor": floor, "seconds": statistics.median(seconds)}


def make_plan(case: Case, facts: dict[str, Any]) -> Any:
    """What the coordinator would have sent."""
    from edge_sdk.protocol.plan import Plan

    rows = {"batch_size": case.rows, "micro_batch": case.rows}
    return Plan(split=case.split, ranks=facts["ranks"], alphas={}, tail=case.tail, **rows)


def part_files(case: Case, folder: Path) -> dict[str, Path]:
    """The slice's parts."""
    names = ["front", *(f"block.{i}" for i in range(case.split)), *(["tail"] * case.tail)]
    return {name: folder / f"{name}.safetensors" for name in names}


def onnx_runtime(case: Case, folder: Path, facts: dict[str, Any], steps: int) -> Any:
    """The slice on onnxruntime."""
    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.model.safetensors_files import map_part
    from edge_sdk.runtime.onnx_graphs import read_graphs
    from edge_sdk.runtime.onnx_runtime import OnnxRuntime
    from edge_sdk.runtime.training import TrainingConfig

    parts = {name: map_part(path) for name, path in part_files(case, folder).items()}
    settings = (make_plan(case, facts), LoraConfig(r=case.rank), TrainingConfig(), steps)
    return OnnxRuntime(read_graphs(folder / "graphs"), parts, *settings, threads=1)


def torch_runtime(case: Case, folder: Path, facts: dict[str, Any], steps: int) -> Any:
    """The slice on torch."""
    from transformers import AutoConfig

    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.model.layout import find_layout
    from edge_sdk.model.weights import open_part
    from edge_sdk.runtime.torch_runtime import TorchRuntime
    from edge_sdk.runtime.training import TrainingConfig

    config = AutoConfig.from_pretrained(folder)
    layout = find_layout(config, case.task)
    base = "float32" if case.kind == "recompute" else case.kind
    is_streamed = base in ("int8", "int4")
    return TorchRuntime(
        config,
        case.task,
        layout,
        {
            name: open_part(path, is_streamed=is_streamed)
            for name, path in part_files(case, folder).items()
        },
        make_plan(case, facts),
        LoraConfig(r=case.rank),
        TrainingConfig(),
        steps,
        device="cpu",
        compute=case.compute,
        base=base,
        recompute=case.kind == "recompute",
    )


def set_residual(runtime: Any, case: Case) -> None:
    """Give every adapted weight a frozen residual, as earlier rounds would have."""
    import numpy as np

    from edge_sdk.lora.factors import Factors

    generator = np.random.default_rng(0)
    residual = {}
    for name, pair in runtime.state.adapters.pairs().items() if case.residual else ():
        outputs, inputs = pair.b_OR.shape[0], pair.a_RI.shape[1]
        b_OS = generator.normal(0, 1e-3, (outputs, case.residual)).astype(np.float32)
        a_SI = generator.normal(0, 1e-3, (case.residual, inputs)).astype(np.float32)
        residual[name] = Factors(b_OS, a_SI)
    runtime.state.set_residual(residual)


def train_step(runtime: Any, case: Case, facts: dict[str, Any], step: int, steps: int) -> float:
    """One step; returns its processor time."""
    import numpy as np

    from edge_sdk.protocol.codecs import decode, encode

    began = time.process_time()
    micro, targets = make_micro(case, facts["vocab_size"], step, steps)
    if case.split == facts["num_blocks"]:
        runtime.local(micro, targets, step, 0)
    else:
        hidden_BTD = runtime.forward(micro, step, 0)
        sent = encode(hidden_BTD, "bfloat16")
        if case.tail:
            top_BTD = decode(sent, "bfloat16", hidden_BTD.shape)
            _, grad_BTD = runtime.tail(top_BTD, micro, targets)
        else:
            grad_BTD = np.full_like(hidden_BTD, 1e-4)
        coded = encode(grad_BTD, "bfloat16")
        del grad_BTD  # the coordinator's, not the device's
        runtime.backward(decode(coded, "bfloat16", hidden_BTD.shape))
    runtime.step(step)
    return time.process_time() - began


def make_micro(case: Case, vocab_size: int, step: int, steps: int) -> tuple[Any, int]:
    """Rows of tokens that are spread over the vocabulary, the last one padded, and its targets."""
    import numpy as np

    from edge_sdk.data.batches import MicroBatch

    tokens = case.rows * case.length
    spread = np.arange(tokens) * steps + step
    ids = (spread * vocab_size // (tokens * steps)).reshape(case.rows, case.length)
    lengths = np.full(case.rows, case.length, np.int32)
    lengths[-1] -= 5
    ids[-1, -5:] = 0
    if case.task == "sequence-classification":
        labels = np.arange(case.rows, dtype=np.int64) % 2
        return MicroBatch(ids, lengths, labels), case.rows
    labels = ids.copy()
    labels[-1, -5:] = -100
    return MicroBatch(ids, lengths, labels), int((labels[:, 1:] != -100).sum())
