"""A model cut in two or in three trains exactly as the unsplit PEFT model does."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from coordinator.engine.interface import Job
from coordinator.engine.local import LocalEngine
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import Layout, Task, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.model.precision import Base, autocast
from edge_sdk.model.quantized import resolve_base
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from tests.families import MORE, more_config, more_model
from tests.kept_bases import keep_as
from tests.tiny import (
    BLOCKS,
    EXPERTS,
    FAMILIES,
    make_config,
    make_micro,
    make_model,
    make_parts,
    num_targets,
    task_of,
)

LORA = LoraConfig(r=4, lora_alpha=8)
TRAINING = TrainingConfig(optimizer="sgd", learning_rate=1e-2, max_grad_norm=0.0)
SPLIT = 2
WEIGHT = 4.0  # samples of the device
RELATIVE = 1e-6
# PEFT adds B A of experts to their float32 weights, which rounds; ours stands beside them.
RELATIVE_EXPERTS = 5e-6


# One of each kind: a composite config, stored buffers, position biases, inputs for each
# block with shared keys, what is made of the ids, and a family in which PEFT forbids names.
BESIDE = ("gemma3", "apertus", "mpnet", "deberta", "gemma4", "gemma3n", "zamba2", "mamba2")


def config_of(family: str) -> tuple[Any, Task]:
    """Config and task of a tiny model."""
    if family in BESIDE:
        return more_config(family), MORE[family][1]
    return make_config(family), task_of(family)


def plain_model(halves: Halves) -> nn.Module:
    """The unsplit model as it lies on disk; every call makes a new one."""
    if halves.family in BESIDE:
        return more_model(halves.family, halves.config)
    return make_model(halves.config, halves.task)


def model_of(halves: Halves) -> nn.Module:
    """The unsplit model, of whose weights each side keeps what its base does."""
    model = plain_model(halves)
    keep_as(model, halves.layout, halves.base, stop=halves.split)
    keep_as(model, halves.layout, halves.server_base, halves.split)
    return model


def compute_of(base: Base) -> Any:
    """The dtype of products that a base needs."""
    return base if base in ("bfloat16", "float16") else "float32"


class Halves:
    """A device and a coordinator's engine over the same tiny model, without a network."""

    def __init__(
        self,
        family: str,
        *,
        tail: bool,
        split: int = SPLIT,
        base: Base = "float32",
        server_base: Base = "float32",
    ) -> None:
        self.family, self.base, self.server_base = family, base, server_base
        self.split, self.tail = split, tail
        self.config, self.task = config_of(family)
        self.layout: Layout = find_layout(self.config, self.task)
        self.model = plain_model(self)
        self.shapes = find_targets(self.config, self.task, self.layout, LORA)
        self.start = {n: _warm_pair(n, s) for n, s in self.shapes.items()}
        self.device = self._make_device()
        self.engine = self._make_engine()

    def _ranks(self, first: int, stop: int) -> dict[str, int]:
        prefixes = tuple(f"{self.layout.blocks_path}.{i}." for i in range(first, stop))
        return {n: LORA.r for n in self.shapes if n.startswith(prefixes)}

    def _make_device(self) -> TorchRuntime:
        names = ["front", *(f"block.{i}" for i in range(self.split)), *(["tail"] * self.tail)]
        plan = Plan(
            split=self.split,
            ranks=self._ranks(0, self.split),
            alphas={},
            batch_size=4,
            micro_batch=4,
            tail=self.tail,
        )
        parts = make_parts(self.model, self.layout, names)
        runtime = TorchRuntime(
            self.config,
            self.task,
            self.layout,
            parts,
            plan,
            LORA,
            TRAINING,
            10,
            device="cpu",
            compute=compute_of(self.base),
            base=self.base,
        )
        runtime.state.adapters.load_pairs({n: self.start[n] for n in plan.ranks})
        return runtime

    def _make_engine(self) -> LocalEngine:
        compute = compute_of(self.server_base)
        dtype, kind = resolve_base(self.server_base, getattr(torch, compute))
        slice_ = Slice(self.config, self.task, self.layout, dtype, quantized=kind)
        names = ["late", *(f"block.{i}" for i in range(self.split, self.layout.num_blocks))]
        if not self.tail:
            names += ["tail", *(["front"] if self.layout.tail_needs_front else [])]
        for name, tensors in make_parts(self.model, self.layout, names).items():
            slice_.add(name, tensors)
        ranks = self._ranks(self.split, self.layout.num_blocks)
        engine = LocalEngine(
            slice_,
            self.split,
            ranks,
            LORA,
            TRAINING,
            10,
            trains_head=not self.tail,
            compute=compute,
        )
        engine.begin({n: self.start[n] for n in ranks})
        return engine

    def step(self, micros: list[MicroBatch]) -> float:
        """Accumulate all micro-batches of a step; returns its loss."""
        targets = sum(num_targets(micro) for micro in micros)
        loss = 0.0
        for index, micro in enumerate(micros):
            hidden = self.device.forward(micro, 0, index)
            labels = None if self.tail else micro.labels
            ids = micro.input_ids if self.layout.needs_ids else None
            sizes = WEIGHT, targets, hidden, micro.lengths
            job = Job("d", self.split, *sizes, labels, ids, micro=index)
            if self.tail:
                top = self.engine.forward([job], 0, index)["d", index]
                sums, grad = self.device.tail(top, micro, targets)
                (answer,) = self.engine.backward({("d", index): grad})
                loss += sums.loss_sum
            else:
                (answer,) = self.engine.train([job], 0, index)
                assert answer.sums is not None
                loss += answer.sums.loss_sum
            self.device.backward(answer.grad_BTD)
        return loss / targets

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of all adapters (and head) on both sides, by whole-model name."""
        both = {
            **self.device.state.optimizer.parameters,
            **self.engine.trained.optimizer.parameters,
        }
        return {
            n: p.grad / (WEIGHT if n in self.engine.trained.optimizer.parameters else 1.0)
            for n, p in both.items()
            if p.grad is not None
        }


def _warm_pair(name: str, shape: Any) -> Pair:
    """Factors with B away from zero, so that A has gradients too."""
    pair = initial_pair(name, LORA.r, shape, seed=0)
    b_OR = np.random.default_rng(len(name)).normal(0, 0.05, pair.b_OR.shape)
    return Pair(pair.a_RI, b_OR.astype(np.float32))


def whole_step(halves: Halves, micros: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same step by PEFT alone on the unsplit model."""
    stacked = [n for n, shape in halves.shapes.items() if shape.num_experts]
    # Linear layers beside experts, too: as modules, PEFT would take them for experts of old.
    beside = [n for n in halves.shapes if ".mlp." in n and n not in stacked] * bool(stacked)
    config = peft.LoraConfig(
        target_modules=[n for n in halves.shapes if n not in (*stacked, *beside)],
        target_parameters=[*stacked, *(f"{n}.weight" for n in beside)] or None,
        r=LORA.r,
        lora_alpha=LORA.lora_alpha,
        fan_in_fan_out=halves.config.model_type == "gpt2",
    )
    model = model_of(halves)
    model = peft.inject_adapter_in_model(config, model).train()
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".lora_" in name:  # as PEFT's own `get_peft_model` has them
            parameter.data = parameter.data.float()
    head = set(halves.device.state.head()) | set(halves.engine.trained.head())
    trained: dict[str, torch.Tensor] = {n: parameters[n].requires_grad_(True) for n in head}
    with torch.no_grad():
        for name, pair in halves.start.items():
            for factor, value in zip("AB", flat(*pair), strict=True):
                parameter = parameters[f"{in_peft(name)}.lora_{factor}.default.weight"]
                parameter.copy_(torch.from_numpy(value))
                trained[f"{name}.{factor}"] = parameter
    targets = sum(num_targets(micro) for micro in micros)
    loss = 0.0
    for micro in micros:
        ids, lengths, labels = (torch.from_numpy(x) for x in micro[:3])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        with autocast(getattr(torch, compute_of(halves.server_base)), torch.device("cpu")):
            mean = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        own = mean * num_targets(micro)
        (own / targets).backward()
        loss += float(own.detach())
    return loss / targets, {n: p.grad for n, p in trained.items() if p.grad is not None}


def in_peft(name: str) -> str:
    """Where PEFT keeps an adapter: of two parameters of one module, the second wraps the first."""
    if ".experts." not in name:
        return name
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer" if leaf == "gate_up_proj" else path


def flat(a_RI: Any, b_OR: Any) -> tuple[Any, Any]:
    """Factors as PEFT lays them down: those of experts are one matrix."""
    if a_RI.ndim == 2:
        return a_RI, b_OR
    a, b = torch.as_tensor(a_RI), torch.as_tensor(b_OR)
    return a.flatten(0, 1).numpy(), b.permute(1, 2, 0).flatten(1).numpy()


@pytest.mark.parametrize("labels", ["server", "device"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_micro", [1, 3])
def test_loss_and_gradients_equal_peft(family: str, labels: str, num_micro: int) -> None:
    """Cut in two (labels: server) or three (device), loss and all gradients are PEFT's own."""
    _assert_equal(Halves(family, tail=labels == "device"), num_micro)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_train_as_peft_trains_them(family: str) -> None:
    """Adapters on experts, which PEFT has as parameters, with the tail on the device."""
    _assert_equal(Halves(family, tail=True), num_micro=2)


@pytest.mark.parametrize("family", BESIDE)
def test_blocks_that_get_more_than_a_hidden_state_train_as_peft_does(family: str) -> None:
    """What blocks get beside it is on both sides: loss and all gradients are PEFT's own."""
    _assert_equal(Halves(family, tail=False, split=1), num_micro=2)


@pytest.mark.parametrize("family", ["apertus", "gemma4", "mpnet"])
def test_such_blocks_are_quantised_as_others_are(family: str) -> None:
    """A device's int8 weights and stored numbers train as the weights do that they stand for."""
    _assert_equal(Halves(family, tail=False, split=1, base="int8"), num_micro=1)


@pytest.mark.parametrize("cut", range(1, BLOCKS))
@pytest.mark.parametrize("base", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
def test_a_quantised_coordinator_equals_peft_at_every_cut(
    family: str, base: Base, cut: int
) -> None:
    """Its blocks train as PEFT's do on the weights that the codes stand for, wherever it is cut."""
    _assert_equal(Halves(family, tail=cut % 2 == 0, split=cut, server_base=base), num_micro=2)


@pytest.mark.parametrize("cut", range(1, BLOCKS))
@pytest.mark.parametrize("family", ["gpt2"])
def test_sixteen_bits_on_both_sides_are_the_whole_model(family: str, cut: int) -> None:
    """A model in bfloat16, cut anywhere, trains as transformers and PEFT train it uncut."""
    halves = Halves(family, tail=False, split=cut, base="bfloat16", server_base="bfloat16")
    _assert_equal(halves, num_micro=2)


def _assert_equal(halves: Halves, num_micro: int) -> None:
    micros = [make_micro(halves.task, seed, longest=7 + seed) for seed in range(num_micro)]

    loss = halves.step(micros)
    gradients = halves.gradients()

    whole_loss, whole_gradients = whole_step(halves, micros)
    assert loss == pytest.approx(whole_loss, rel=RELATIVE)
    assert gradients.keys() == whole_gradients.keys()
    for name, expected in whole_gradients.items():
        stem, _, factor = name.rpartition(".")
        found = gradients[name]
        if factor in "AB":
            both = flat(gradients[f"{stem}.A"], gradients[f"{stem}.B"])
            found = torch.as_tensor(both["AB".index(factor)])
        error = (found - expected).norm() / expected.norm()
        limit = RELATIVE_EXPERTS if halves.family in EXPERTS else RELATIVE
        assert error <= limit, f"{name}: {error}"
