"""Devices and a coordinator that measure importance, and what dense float64 says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from coordinator.engine.interface import Job
from coordinator.engine.local import LocalEngine
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.importance import Form
from edge_sdk.lora.targets import LoraConfig, Shape, find_targets
from edge_sdk.model.layout import Layout, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from tests.tiny import (
    BLOCKS,
    make_config,
    make_micro,
    make_model,
    make_parts,
    num_targets,
    task_of,
)

FORMS: list[Form] = ["free", "reference", "signed"]
MAIN = ["gpt2", "llama", "bert"]
LORA = LoraConfig(experts=False, r=3, lora_alpha=6.0)
# The meter works in float32, the reference in float64.
CLOSE = {"rtol": 2e-4, "atol": 1e-7}
STILL = TrainingConfig(optimizer="sgd", learning_rate=1e-20, lr_scheduler_type="constant")


class Known:
    """A tiny model, looked at once, with warm adapters on every second weight and a residual."""

    def __init__(self, family: str) -> None:
        self.config, self.task = make_config(family), task_of(family)
        self.layout: Layout = find_layout(self.config, self.task)
        self.model = make_model(self.config, self.task)
        with torch.no_grad():  # families begin with biases of 0
            for name, parameter in self.model.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        self.shapes: dict[str, Shape] = find_targets(self.config, self.task, self.layout, LORA)
        names = list(self.shapes)
        self.ranks = {name: 3 * (i % 2) for i, name in enumerate(names)}
        self.pairs = {n: warm_pair(n, self.shapes[n]) for n in names if self.ranks[n]}
        self.residual = {n: warm_factors(n, self.shapes[n]) for n in names[::3]}

    def names(self, first: int, stop: int) -> list[str]:
        """Weights of blocks first .. stop-1."""
        prefixes = tuple(f"{self.layout.blocks_path}.{i}." for i in range(first, stop))
        return [name for name in self.shapes if name.startswith(prefixes)]

    def block_of(self, name: str) -> int:
        """The block of a weight."""
        return int(name.removeprefix(f"{self.layout.blocks_path}.").split(".", 1)[0])


@cache
def known(family: str) -> Known:
    """The tiny model of a family."""
    return Known(family)


def warm_pair(name: str, shape: Shape) -> Pair:
    """Factors with B away from zero."""
    pair = initial_pair(name, 3, shape, seed=0)
    b_OR = np.random.default_rng(len(name)).normal(0, 0.05, pair.b_OR.shape)
    return Pair(pair.a_RI, b_OR.astype(np.float32))


def warm_factors(name: str, shape: Shape) -> Factors:
    """A residual of rank 2."""
    generator = np.random.default_rng(len(name) + 1)
    b_OR = generator.normal(0, 0.1, (shape.num_outputs, 2)).astype(np.float32)
    return Factors(b_OR, generator.normal(0, 0.1, (2, shape.num_inputs)).astype(np.float32))


def make_runtime(
    family: str, split: int, training: TrainingConfig = STILL, **options: Any
) -> TorchRuntime:
    """A device with the tail, warm."""
    k = known(family)
    names = ["front", *(f"block.{i}" for i in range(split)), "tail"]
    here = k.names(0, split)
    plan = Plan(
        split=split,
        ranks={n: k.ranks[n] for n in here},
        alphas={},
        batch_size=4,
        micro_batch=4,
        tail=True,
    )
    parts = make_parts(k.model, k.layout, names)
    runtime = TorchRuntime(
        k.config, k.task, k.layout, parts, plan, LORA, training, 10, device="cpu", **options
    )
    runtime.state.adapters.load_pairs({n: k.pairs[n] for n in here if n in k.pairs})
    runtime.state.set_residual({n: k.residual[n] for n in here if n in k.residual})
    return runtime


def make_engine(family: str, first: int, **options: Any) -> LocalEngine:
    """The coordinator's blocks, warm."""
    k = known(family)
    slice_ = Slice(k.config, k.task, k.layout, torch.float32)
    for name, tensors in make_parts(k.model, k.layout, list(k.layout.part_names())).items():
        slice_.add(name, tensors)
    here = k.names(first, BLOCKS)
    ranks = {n: k.ranks[n] for n in here}
    options = {"trains_head": True, **options}
    engine = LocalEngine(slice_, first, ranks, LORA, STILL, 10, **options)
    residuals = {n: k.residual[n] for n in here if n in k.residual}
    engine.begin({n: k.pairs[n] for n in here if n in k.pairs}, residuals)
    return engine


def make_job(
    name: str, split: int, micro: MicroBatch, hidden: Any, weight: float, targets: int
) -> Job:
    """What a device sends."""
    labels = micro.labels.astype(np.int32)
    return Job(name, split, weight, targets, np.asarray(hidden), micro.lengths, labels)


# ---- the dense reference -------------------------------------------------------------------------


@dataclass
class Record:
    """What float64 autograd says of one weight and one micro-batch."""

    weight_OI: torch.Tensor
    """W alone."""
    grad_OI: torch.Tensor
    """dL/dW, formed densely."""
    dots_N: torch.Tensor
    """<d_t, W x_t> by token."""


def dense(family: str, micro: MicroBatch, targets: int) -> dict[str, Record]:
    """What float64 says of all weights; the same micro-batch is computed once."""
    key = (family, micro.input_ids.tobytes(), micro.labels.tobytes(), targets)
    if key not in DENSE:
        DENSE[key] = compute_dense(family, micro, targets)
    return DENSE[key]


DENSE: dict[Any, dict[str, Record]] = {}


def compute_dense(family: str, micro: MicroBatch, targets: int) -> dict[str, Record]:
    """Run the whole model in float64 with all adapters merged into its weights."""
    k = known(family)
    model = make_model(k.config, k.task)
    model.load_state_dict(k.model.state_dict())
    model.double().train()
    experts: Any = model
    experts.set_experts_implementation("eager")  # grouped products know no float64
    base, seen = {}, {}
    for name in k.shapes:
        layer: Any = model.get_submodule(name)
        turned = type(layer).__name__ == "Conv1D"
        base[name] = (layer.weight.T if turned else layer.weight).detach().clone()
        merged = base[name] + torch.from_numpy(added(k, name))
        layer.weight = nn.Parameter(merged.T.contiguous() if turned else merged)
        layer.register_forward_hook(keep(seen, name))
    mean_loss(model, micro, targets).backward()
    return {name: record(model.get_submodule(name), base[name], *seen[name]) for name in k.shapes}


def record(layer: Any, weight_OI: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> Record:
    """What autograd has left on one layer."""
    assert y.grad is not None
    grad_OI = layer.weight.grad.T if type(layer).__name__ == "Conv1D" else layer.weight.grad
    d_NO, x_NI = y.grad.flatten(0, -2), x.flatten(0, -2)
    return Record(weight_OI, grad_OI, ((x_NI @ weight_OI.T) * d_NO).sum(-1))


def added(k: Known, name: str) -> np.ndarray:
    """The dense s B A + U V of a weight."""
    shape = k.shapes[name]
    total = np.zeros(shape)
    if name in k.pairs:
        pair = k.pairs[name]
        total = total + LORA.scale(name, 3) * pair.b_OR.astype(np.float64) @ pair.a_RI
    if name in k.residual:
        total = total + k.residual[name].b_OR.astype(np.float64) @ k.residual[name].a_RI
    return total


def keep(seen: dict[str, Any], name: str) -> Any:
    """A forward hook that keeps input and output."""

    def hook(_m: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> None:
        y.retain_grad()
        seen[name] = (args[0].detach(), y)

    return hook


def mean_loss(model: nn.Module, micro: MicroBatch, targets: int) -> torch.Tensor:
    """Sum of the micro-batch's losses over the targets of the step."""
    ids, lengths, labels = (torch.from_numpy(x) for x in micro[:3])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum") / targets


def expected(
    form: Form, steps: Sequence[Sequence[tuple[float, dict[str, Record]]]], name: str
) -> float:
    """The form's definition, by brute force, over micro-batches of shares of records."""
    if form == "reference":
        return sum(
            float((s[0][1][name].weight_OI * sum(p * r[name].grad_OI for p, r in s)).abs().sum())
            for s in steps
        )
    if form == "free":
        return sum(p * float(r[name].dots_N.abs().sum()) for s in steps for p, r in s)
    products = (p * (r[name].weight_OI * r[name].grad_OI).sum() for s in steps for p, r in s)
    return abs(float(sum(products)))


def check(found: Mapping[str, float], due: Mapping[str, float]) -> None:
    """Same names, same values."""
    assert found.keys() == due.keys()
    for name, value in due.items():
        np.testing.assert_allclose(found[name], value, **CLOSE, err_msg=name)  # type: ignore[arg-type]


def two_micros(family: str) -> tuple[list[MicroBatch], int]:
    """A step in two micro-batches of different lengths, and its targets."""
    micros = [make_micro(task_of(family), 3), make_micro(task_of(family), 4, rows=2, longest=6)]
    return micros, sum(map(num_targets, micros))


SPLITS = {"a": 1, "b": 4, "c": 2}
WEIGHTS = {"a": 2.0, "b": 6.0, "c": 4.0}


def wave(family: str) -> tuple[list[Job], dict[str, dict[str, Record]], dict[str, Any]]:
    """Three devices with their own data, splits and sizes; jobs, dense records and runtimes."""
    jobs, records, runtimes = [], {}, {}
    for seed, (name, split) in enumerate(SPLITS.items()):
        micro = make_micro(task_of(family), seed, rows=2 + seed, longest=5 + seed)
        targets = num_targets(micro)
        runtimes[name] = make_runtime(family, split)
        runtimes[name].state.meter.measure("free", 1)
        hidden = runtimes[name].forward(micro, 0, 0)
        jobs.append(make_job(name, split, micro, hidden, WEIGHTS[name], targets))
        records[name] = dense(family, micro, targets)
    return jobs, records, runtimes
