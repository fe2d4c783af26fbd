"""The same slice of a tiny model on every backend; what is exported is exported once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from coordinator.onnx_export.export import export_slice
from coordinator.onnx_export.job import ExportJob
from edge_sdk.client import backends as client
from edge_sdk.client.backends import missing_packages
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig, Shape, find_targets
from edge_sdk.model.layout import Layout, Task, find_layout
from edge_sdk.model.safetensors_files import Stored, map_part
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.interface import Runtime
from edge_sdk.runtime.onnx_graphs import Graphs, read_graphs
from edge_sdk.runtime.onnx_runtime import OnnxRuntime
from edge_sdk.runtime.onnx_sizes import Sizes, check_room
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from tests.tiny import FAMILIES, make_config, make_model, make_parts, task_of

LORA = LoraConfig(r=3, lora_alpha=6.0)
# onnxruntime-training is there in an environment of its own: see scripts/test.
BACKENDS = tuple(name for name, one in client.BACKENDS.items() if not missing_packages(one))
SPLIT = 2
TOTAL_STEPS = 100


class Known(NamedTuple):
    """A tiny model and what every backend needs of it."""

    config: Any
    task: Task
    layout: Layout
    parts: Mapping[str, Any]
    mapped: Mapping[str, Mapping[str, Stored]]
    targets: Mapping[str, Shape]


def known(family: str, dtype: torch.dtype = torch.float32) -> Known:
    """A model of *family*, cut after block 1, with its tail; stored as *dtype*."""
    return _known(family, dtype)


@cache
def _known(family: str, dtype: torch.dtype) -> Known:
    if family == "qwen2":
        settings = {**FAMILIES["llama"][1], "tie_word_embeddings": False}
        config, task = AutoConfig.for_model("qwen2", **settings), task_of("llama")
        config.use_cache = False
    else:
        config, task = make_config(family), task_of(family)
    layout = find_layout(config, task)
    model = make_model(config, task).to(dtype)
    names = ["front", *(f"block.{i}" for i in range(SPLIT)), "tail"]
    parts = make_parts(model, layout, names)
    prefixes = tuple(f"{layout.blocks_path}.{i}." for i in range(SPLIT))
    shapes = find_targets(config, task, layout, LORA)
    targets = {n: s for n, s in shapes.items() if n.startswith(prefixes)}
    return Known(config, task, layout, parts, stored_parts(parts), targets)


def stored_parts(parts: Mapping[str, Any]) -> dict[str, Mapping[str, Stored]]:
    """Parts as a device without torch has them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.safetensors" for name in parts}
        for name, tensors in parts.items():
            save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, paths[name])
        return {name: map_part(path) for name, path in paths.items()}


def graphs(family: str, dtype: torch.dtype = torch.float32) -> Graphs:
    """What the coordinator would send for the slice; llama's measure importance, too."""
    return _graphs(family, dtype)


@cache
def _graphs(family: str, dtype: torch.dtype) -> Graphs:
    model = known(family, dtype)
    stored = {n: t for tensors in model.parts.values() for n, t in tensors.items()}
    job = ExportJob(
        task=model.task,
        num_labels=getattr(model.config, "num_labels", 0),
        split=SPLIT,
        tail=True,
        measures=family == "llama",
        targets=model.targets,
        dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in stored.items()},
    )
    made = export_slice(model.config, job, model.layout)
    with tempfile.TemporaryDirectory() as folder:  # as a device sees them
        path = Path(folder) / "graphs.safetensors"
        path.write_bytes(made.pack())
        made = read_graphs(path)
    check_room(made.programs(), Sizes(B=8, T=64, N=128, R=8), 4e6)
    return made


def make_runtime(
    backend: str,
    family: str,
    ranks: Callable[[int], int] = lambda _: 3,
    *,
    dtype: torch.dtype = torch.float32,
    **training: Any,
) -> Runtime:
    """The slice on *backend*; *ranks* gives that of the n-th weight."""
    model = known(family, dtype)
    held = {name: ranks(index) for index, name in enumerate(model.targets)}
    plan = Plan(split=SPLIT, ranks=held, alphas={}, batch_size=4, micro_batch=4, tail=True)
    config = TrainingConfig(**{"learning_rate": 1e-3, **training})
    if backend != "torch":
        found = graphs(family, dtype)
        if backend == "onnxruntime-training":
            from edge_sdk.runtime.onnx_gradients import with_own_gradients

            found = with_own_gradients(found)
        return OnnxRuntime(found, model.mapped, plan, LORA, config, TOTAL_STEPS, threads=1)
    return TorchRuntime(
        model.config,
        model.task,
        model.layout,
        model.parts,
        plan,
        LORA,
        config,
        TOTAL_STEPS,
        device="cpu",
    )


def random_pairs(runtime: Runtime, seed: int = 0) -> dict[str, Pair]:
    """Factors of the right shapes, none of them zero."""
    draw = np.random.default_rng(seed)

    def like(array: np.ndarray) -> np.ndarray:
        return draw.normal(0, 0.1, array.shape).astype(np.float32)

    return {n: Pair(like(p.a_RI), like(p.b_OR)) for n, p in runtime.state.adapters.pairs().items()}


def random_change(family: str, seed: int = 0, rank: int = 2) -> dict[str, Factors]:
    """A change of dW for every weight."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, shape in known(family).targets.items():
        b_OR = draw.normal(0, 0.1, (shape.num_outputs, rank)).astype(np.float32)
        a_RI = draw.normal(0, 0.1, (rank, shape.num_inputs)).astype(np.float32)
        found[name] = Factors(b_OR, a_RI)
    return found
