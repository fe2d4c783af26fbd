"""Importance is what a dense float64 model says, wherever its blocks run and however it is cut."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from coordinator.engine import LocalEngine
from coordinator.wave import Job
from coordinator.wave_input import check_importance
from edge_sdk.adapters import LoraConfig, Pair, Shape, find_targets, initial_pair
from edge_sdk.errors import ConfigError, RemoteProtocolError
from edge_sdk.factors import Factors
from edge_sdk.importance import Form, Meter, Smoothing, combine, normalised, weight_of
from edge_sdk.layout import Layout, find_layout
from edge_sdk.partition import Slice
from edge_sdk.plan import Plan
from edge_sdk.runtime import Micro
from edge_sdk.runtime_torch import TorchRuntime
from edge_sdk.training import TrainingConfig
from tests.tiny import (
    BLOCKS,
    FAMILIES,
    OTHERS,
    make_config,
    make_micro,
    make_model,
    make_parts,
    num_targets,
    task_of,
)

FORMS: list[Form] = ["free", "reference", "signed"]
MAIN = ["gpt2", "llama", "bert"]
LORA = LoraConfig(r=3, lora_alpha=6.0)
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
    runtime.load_pairs({n: k.pairs[n] for n in here if n in k.pairs})
    runtime.set_residual({n: k.residual[n] for n in here if n in k.residual})
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
    engine.load_pairs({n: k.pairs[n] for n in here if n in k.pairs})
    engine.adapters.set_residual({n: k.residual[n] for n in here if n in k.residual})
    return engine


def make_job(name: str, split: int, micro: Micro, hidden: Any, weight: float, targets: int) -> Job:
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


def dense(family: str, micro: Micro, targets: int) -> dict[str, Record]:
    """What float64 says of all weights; the same micro-batch is computed once."""
    key = (family, micro.input_ids.tobytes(), micro.labels.tobytes(), targets)
    if key not in DENSE:
        DENSE[key] = compute_dense(family, micro, targets)
    return DENSE[key]


DENSE: dict[Any, dict[str, Record]] = {}


def compute_dense(family: str, micro: Micro, targets: int) -> dict[str, Record]:
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


def mean_loss(model: nn.Module, micro: Micro, targets: int) -> torch.Tensor:
    """Sum of the micro-batch's losses over the targets of the step."""
    ids, lengths, labels = (torch.from_numpy(x) for x in micro)
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


def two_micros(family: str) -> tuple[list[Micro], int]:
    """A step in two micro-batches of different lengths, and its targets."""
    micros = [make_micro(task_of(family), 3), make_micro(task_of(family), 4, rows=2, longest=6)]
    return micros, sum(map(num_targets, micros))


# ---- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_a_device_with_the_whole_model_equals_the_dense_reference(family: str, form: Form) -> None:
    """Padded micro-batches, adapted weights and bare ones, beside adapters and residuals."""
    micros, targets = two_micros(family)
    runtime = make_runtime(family, BLOCKS)
    runtime.measure_importance(form, 1)

    for index, micro in enumerate(micros):
        runtime.local(micro, targets, 0, index)
    runtime.step(0)

    steps = [[(1.0, dense(family, micro, targets))] for micro in micros]
    check(runtime.take_importance(), {n: expected(form, steps, n) for n in known(family).shapes})


@pytest.mark.parametrize("family", sorted({**FAMILIES, **OTHERS}.keys() - set(MAIN)))
def test_every_family_is_measured_by_the_same_code(family: str) -> None:
    """Eight more model families equal the dense reference, in every form."""
    micro = make_micro(task_of(family), 3)
    targets = num_targets(micro)
    runtime = make_runtime(family, BLOCKS)

    for form in FORMS:
        runtime.measure_importance(form, 1)
        runtime.local(micro, targets, 0, 0)
        runtime.step(0)

        steps = [[(1.0, dense(family, micro, targets))]]
        due = {n: expected(form, steps, n) for n in known(family).shapes}
        check(runtime.take_importance(), due)


@pytest.mark.parametrize("labels", ["server", "device"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_device_and_coordinator_together_equal_the_whole(
    family: str, form: Form, labels: str
) -> None:
    """Cut anywhere, labels anywhere, in micro-batches: the values of the unsplit model."""
    micros, targets = two_micros(family)
    runtime = make_runtime(family, 2)
    engine = make_engine(family, 2, trains_head=labels == "server")
    for side in (runtime, engine):
        side.measure_importance(form, 1)

    for index, micro in enumerate(micros):
        job = make_job("a", 2, micro, runtime.forward(micro, 0, index), 6.0, targets)
        if labels == "server":
            (answer,) = engine.train([job], 0, index)
        else:
            _, grad = runtime.tail(engine.lift([job], 0, index)["a"], micro, targets)
            (answer,) = engine.lower({"a": grad})
        runtime.backward(answer.grad_BTD)
    runtime.step(0)
    engine.finish_step(0)

    steps = [[(1.0, dense(family, micro, targets))] for micro in micros]
    found = {**runtime.take_importance(), **engine.take_importance()}
    check(found, {n: expected(form, steps, n) for n in known(family).shapes})


SPLITS = {"a": 1, "b": 4, "c": 2}
WEIGHTS = {"a": 2.0, "b": 6.0, "c": 4.0}


def wave(family: str) -> tuple[list[Job], dict[str, dict[str, Record]], dict[str, Any]]:
    """Three devices with their own data, splits and sizes; jobs, dense records and runtimes."""
    jobs, records, runtimes = [], {}, {}
    for seed, (name, split) in enumerate(SPLITS.items()):
        micro = make_micro(task_of(family), seed, rows=2 + seed, longest=5 + seed)
        targets = num_targets(micro)
        runtimes[name] = make_runtime(family, split)
        runtimes[name].measure_importance("free", 1)
        hidden = runtimes[name].forward(micro, 0, 0)
        jobs.append(make_job(name, split, micro, hidden, WEIGHTS[name], targets))
        records[name] = dense(family, micro, targets)
    return jobs, records, runtimes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_wave_is_measured_for_the_weighted_mean_loss(family: str, form: Form) -> None:
    """Each block's value is that of the mean over the devices served there, by their samples."""
    jobs, records, _ = wave(family)
    engine = make_engine(family, 1)
    engine.measure_importance(form, 1)

    engine.train(jobs, 0, 0)
    engine.finish_step(0)

    due = {}
    for name in known(family).names(1, BLOCKS):
        here = [n for n, split in SPLITS.items() if split <= known(family).block_of(name)]
        total = sum(WEIGHTS[n] for n in here)
        shares = [(WEIGHTS[n] / total, records[n]) for n in here]
        due[name] = expected(form, [shares], name)
    check(engine.take_importance(), due)


def test_combined_reports_equal_the_pooled_loss() -> None:
    """Free form: devices and coordinator joined by shares give sum_i p_i L_i on one machine."""
    jobs, records, runtimes = wave("llama")
    engine, k = make_engine("llama", 1), known("llama")
    engine.measure_importance("free", 1)
    for answer in engine.train(jobs, 0, 0):
        runtimes[answer.device].backward(answer.grad_BTD)
        runtimes[answer.device].step(0)
    engine.finish_step(0)
    total = sum(WEIGHTS.values())
    left = {
        n: sum(WEIGHTS[d] / total for d, split in SPLITS.items() if split <= k.block_of(n))
        for n in k.shapes
    }

    found = combine(
        {
            "": (left, engine.take_importance()),
            **{n: (WEIGHTS[n] / total, r.take_importance()) for n, r in runtimes.items()},
        }
    )

    pooled = [(WEIGHTS[n] / total, r) for n, r in records.items()]
    check(found, {n: expected("free", [pooled], n) for n in sorted(k.shapes)})


def test_a_device_that_left_counts_nothing() -> None:
    """Who sends no gradient is in no value; a block that served nobody reports nothing."""
    jobs, records, runtimes = wave("llama")
    engine = make_engine("llama", 1, trains_head=False)
    engine.measure_importance("free", 1)
    tops = engine.lift(jobs, 0, 0)
    micro = make_micro("causal-lm", 1, rows=3, longest=6)

    _, grad = runtimes["b"].tail(tops["b"], micro, num_targets(micro))
    engine.lower({"b": grad})
    engine.finish_step(0)

    names = known("llama").names(SPLITS["b"], BLOCKS)
    check(
        engine.take_importance(), {n: expected("free", [[(1.0, records["b"])]], n) for n in names}
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_scale_of_float16_is_divided_out(form: Form) -> None:
    """In half precision the values are those of full precision, up to its rounding."""
    micro = make_micro("causal-lm", 0)
    found = []
    for compute in ("float32", "float16"):
        runtime = make_runtime("llama", BLOCKS, compute=compute)
        runtime.measure_importance(form, 1)
        runtime.local(micro, num_targets(micro), 0, 0)
        runtime.step(0)
        found.append(runtime.take_importance())

    check_rounded(*found)


@pytest.mark.parametrize("form", FORMS)
def test_the_coordinator_divides_its_loss_scale_out(form: Form) -> None:
    """Its values in half precision are those of full precision, up to rounding."""
    jobs, _, _ = wave("llama")
    found = []
    for compute in ("float32", "float16"):
        engine = make_engine("llama", 1, compute=compute)
        engine.measure_importance(form, 1)
        engine.train(jobs, 0, 0)
        engine.finish_step(0)
        found.append(engine.take_importance())

    check_rounded(*found)


def check_rounded(full: Mapping[str, float], half: Mapping[str, float]) -> None:
    """Same names, values that differ by no more than half precision explains."""
    assert half.keys() == full.keys()
    largest = max(full.values())
    for name, value in full.items():
        assert abs(half[name] - value) <= 0.03 * value + 2e-3 * largest, name


def test_what_is_not_finite_is_no_measurement() -> None:
    """A step that overflows leaves the values of the others alone."""
    micro, runtime = make_micro("causal-lm", 0), make_runtime("llama", 2, compute="float16")
    runtime.measure_importance("free", 1)
    for step, value in enumerate((1e-3, math.inf)):
        hidden = runtime.forward(micro, step, 0)
        runtime.backward(np.full_like(hidden, value))
        runtime.step(step)

    found = runtime.take_importance()

    assert found.keys() == set(known("llama").names(0, 2))
    assert all(math.isfinite(value) for value in found.values())


class Halved(nn.Module):
    """A linear layer that keeps its weight in eight bits and shows it only on request."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale_O1 = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale_O1", scale_O1)
        self.register_buffer("codes_OI", (linear.weight.detach() / scale_O1).round().to(torch.int8))
        self.bias = linear.bias

    def dequantize(self) -> torch.Tensor:
        """The dense weight."""
        codes: Any = self.codes_OI
        dense_OI: torch.Tensor = codes.float() * self.scale_O1
        return dense_OI

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute with what the codes stand for."""
        return F.linear(x, self.dequantize(), self.bias)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_is_measured_by_what_it_stands_for(form: Form) -> None:
    """Values of quantised layers equal those of a model that holds the dequantised weights."""
    k, micro = known("bert"), make_micro(task_of("bert"), 0)
    found = []
    for is_quantised in (True, False):
        model = make_model(k.config, k.task)
        for name in k.shapes:
            parent, _, leaf = name.rpartition(".")
            layer: Any = model.get_submodule(name)
            small = Halved(layer)
            if is_quantised:
                setattr(model.get_submodule(parent), leaf, small)
            else:
                layer.weight = nn.Parameter(small.dequantize())
        model.requires_grad_(False)
        meter = Meter(model, k.shapes, form, 1)
        with meter.watching(0):
            loss = mean_loss(model, micro, num_targets(micro))
        loss.backward()
        meter.close_step(lambda _: 1.0)
        found.append(meter.take())

    check(found[0], found[1])
    assert min(found[1].values()) > 0


def test_the_weight_of_a_layer_is_dense_whatever_holds_it() -> None:
    """A plain layer shows its own weight, a quantised one a dense copy."""
    linear = nn.Linear(4, 3)

    assert weight_of(linear).data_ptr() == linear.weight.data_ptr()
    torch.testing.assert_close(weight_of(Halved(linear)), linear.weight.detach(), atol=5e-3, rtol=0)


# ---- what measuring leaves and costs -------------------------------------------------------------


@pytest.fixture
def _quick_census() -> Iterator[None]:
    """Leave out of `tensors` whatever was there before; there are many modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors() -> Iterator[torch.Tensor]:
    """All tensors that Python holds since the test began."""
    gc.collect()
    return (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


@pytest.mark.usefixtures("_quick_census")
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_and_nothing_hangs_on_other_steps(form: Form) -> None:
    """After a measured step no hook and no tensor remains; between two of them there is none."""
    runtime, micro = make_runtime("gpt2", 2), make_micro("causal-lm", 0)
    runtime.measure_importance(form, 2)
    model = runtime._slice.model

    def one(step: int) -> int:
        hidden = runtime.forward(micro, step, 0)
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        runtime.backward(np.ones_like(hidden))
        del hidden
        runtime.step(step)
        return sum(1 for _ in tensors())

    before = one(1)
    after = one(4)

    assert after == before
    assert runtime.take_importance().keys() == set(known("gpt2").names(0, 2))
    one(5)
    assert runtime.take_importance() == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_measuring_changes_no_bit_of_the_training(family: str, form: Form) -> None:
    """Losses, factors and moments are the same bits with and without it."""
    training, found = TrainingConfig(learning_rate=1e-2), []
    for every in (0, 1):
        runtime = make_runtime(family, BLOCKS, training)
        runtime.measure_importance(form, every)
        losses = []
        for step in range(2):
            micro = make_micro(task_of(family), step)
            losses.append(runtime.local(micro, num_targets(micro), step, 0))
            runtime.step(step)
        runtime.take_importance()
        found.append((losses, runtime.state()))

    (losses, state), (others, other) = found
    assert losses == others
    assert state.keys() == other.keys()
    assert all(np.array_equal(value, other[name]) for name, value in state.items())


def storage(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie."""
    return tensor.untyped_storage().data_ptr()


class Census(TorchDispatchMode):
    """Counts the living tensors of given shapes that were made while it was on."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.most = shapes, 0
        self.alive: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        made = func(*args, **(kwargs or {}))
        inputs = {storage(a) for a in args if isinstance(a, torch.Tensor)}
        is_weight = isinstance(made, torch.Tensor) and tuple(made.shape) in self.shapes
        if is_weight and storage(made) not in inputs:  # neither a view nor in place
            self.alive[len(self.alive)] = weakref.ref(made)
        self.most = max(self.most, sum(ref() is not None for ref in self.alive.values()))
        return made


def test_the_reference_form_holds_one_dense_gradient_at_a_time() -> None:
    """Of all tensors of a weight's size that a backward pass makes, at most one is alive."""
    runtime, micro = make_runtime("llama", BLOCKS), make_micro("causal-lm", 0, rows=3, longest=7)
    runtime.measure_importance("reference", 1)
    shapes = {tuple(shape) for shape in known("llama").shapes.values()}
    hidden = runtime.forward(micro, 0, 0)

    with Census(shapes) as census:
        runtime.backward(np.ones_like(hidden))

    assert len(census.alive) >= len(known("llama").shapes)
    assert census.most == 1


@pytest.mark.usefixtures("_quick_census")
def test_the_free_form_keeps_what_autograd_keeps_anyway() -> None:
    """Between forward and backward it holds nothing new but the outputs of the first layers."""
    micro = make_micro("causal-lm", 0)
    k = known("llama")
    extra = []
    for every in (0, 1):
        runtime = make_runtime("llama", 2)
        runtime.measure_importance("free", every)
        saved: set[int] = set()

        def pack(tensor: torch.Tensor, saved: set[int] = saved) -> torch.Tensor:
            saved.add(storage(tensor))
            return tensor

        before = {storage(t) for t in tensors() if t.device.type == "cpu"}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = runtime.forward(micro, 0, 0)
        found = [t for t in tensors() if t.device.type == "cpu"]
        sizes = {storage(t): t.untyped_storage().nbytes() for t in found}
        extra.append(sum(n for p, n in sizes.items() if p not in before | saved))
        del hidden, found
    first = [n for n in k.names(0, 1) if n.endswith(("q_proj", "k_proj", "v_proj"))]
    bare = [n for n in k.names(0, 2) if not k.ranks[n]]

    tokens = micro.input_ids.size
    outputs = sum(4 * tokens * k.shapes[n].num_outputs for n in first)
    inputs = sum(4 * tokens * k.shapes[n].num_inputs for n in bare if n not in first)
    assert outputs <= extra[1] - extra[0] <= outputs + inputs


# ---- the meter -----------------------------------------------------------------------------------


def test_values_are_means_of_the_measured_steps_and_survive_a_restart() -> None:
    """Every second step is measured; a checkpoint in between goes on where it stopped."""
    values = []
    runtimes = [make_runtime("llama", 2) for _ in range(2)]
    for runtime in runtimes:
        runtime.begin_round()
        runtime.measure_importance("free", 2)

    def one(runtime: Any, step: int) -> None:
        hidden = runtime.forward(make_micro("causal-lm", step), step, 0)
        runtime.backward(np.full_like(hidden, 0.1 * (step + 1)))
        runtime.step(step)

    for step in range(4):
        one(runtimes[0], step)
        if step == 1:
            runtimes[1].load_state(runtimes[0].state())
        if step > 1:
            one(runtimes[1], step)
        single = make_runtime("llama", 2)
        single.measure_importance("free", 1)
        one(single, step)
        values.append(single.take_importance())
    straight, restored = (runtime.take_importance() for runtime in runtimes)

    assert straight == restored
    check(straight, {n: (values[0][n] + values[2][n]) / 2 for n in values[0]})
    assert runtimes[0].take_importance() == {}


def test_a_round_that_starts_again_forgets_what_was_measured() -> None:
    """Steps of an abandoned attempt are in no report, nor half a step of it."""
    micro = make_micro("causal-lm", 0)
    for is_complete in (True, False):
        runtime = make_runtime("llama", 2)
        runtime.measure_importance("free", 1)
        hidden = runtime.forward(micro, 0, 0)
        runtime.backward(np.ones_like(hidden))
        if is_complete:
            runtime.step(0)

        runtime.begin_round()
        runtime.step(1)

        assert runtime.take_importance() == {}


def test_the_coordinator_keeps_its_values_through_a_restart() -> None:
    """State taken between two steps holds what was measured."""
    jobs, _, _ = wave("llama")
    engine, restored = make_engine("llama", 1), make_engine("llama", 1)
    for one in (engine, restored):
        one.begin_round()
        one.measure_importance("free", 1)
    engine.train(jobs, 0, 0)
    engine.finish_step(0)

    restored.load_state(engine.state())

    found = engine.take_importance()
    assert found == restored.take_importance()
    assert found


def test_the_reference_form_is_measured_half_as_often() -> None:
    """With K = 3 steps 0 and 6, where the other forms also take 3 and 9."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    counts = {}
    for form in FORMS:
        meter = Meter(model, ["0", "1"], form, 3)
        for step in range(10):
            with meter.watching(step):
                y = model(torch.ones(1, 3))
            y.sum().backward()
            meter.close_step(lambda _: 1.0)
        counts[form] = int(meter.state()["1"][1])

    assert counts == {"free": 4, "reference": 2, "signed": 4}


@pytest.mark.parametrize(("form", "every"), [("dense", 1), ("free", -1)])
def test_a_form_that_does_not_exist_is_refused(form: Any, every: int) -> None:
    """One line names it and the choice."""
    with pytest.raises(ConfigError, match="choose one of free, reference, signed"):
        Meter(nn.Linear(1, 1), [], form, every)


PLAN = Plan(split=2, ranks={"w": 0}, alphas={}, batch_size=8, micro_batch=4)


def test_a_coordinator_takes_honest_importance_only() -> None:
    """Of weights of the plan, bare ones too; never negative, endless or huge."""
    check_importance(PLAN, {})
    check_importance(PLAN, {"w": 0.0})
    with pytest.raises(RemoteProtocolError, match="importance of 'v', which is not in the plan"):
        check_importance(PLAN, {"w": 1.0, "v": 1.0})
    for bad in (-1e-9, math.inf, math.nan, 2e9):
        with pytest.raises(RemoteProtocolError, match=r"importance of 'w': .* outside 0\.\.1e\+09"):
            check_importance(PLAN, {"w": bad})


# ---- arithmetic ----------------------------------------------------------------------------------


def test_values_are_divided_by_their_costs() -> None:
    """Theta is the value per byte."""
    assert normalised({"b": 6.0, "a": 1.0}, {"a": 4.0, "b": 3.0, "c": 1.0}) == {"a": 0.25, "b": 2.0}


def test_combining_is_a_weighted_mean_over_the_holders() -> None:
    """Who does not hold a weight, or has no share of it, counts nothing; names come sorted."""
    reports = {
        "b": (0.25, {"w": 8.0, "v": 1.0}),
        "a": (0.5, {"w": 2.0}),
        "": ({"w": 0.25, "u": 0.0}, {"w": 4.0, "u": 9.0, "t": 9.0}),
    }

    found = combine(reports)

    assert list(found.items()) == [("v", 1.0), ("w", (0.25 * 8 + 0.5 * 2 + 0.25 * 4) / 1.0)]
    assert combine(dict(reversed(reports.items()))) == found
    assert combine({}) == {}


POSITIVE = st.floats(1e-9, 1e6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": POSITIVE, "b": POSITIVE}), min_size=1, max_size=12))
def test_smoothing_is_the_formula_of_the_paper(rounds: list[dict[str, float]]) -> None:
    """A literal transcription, weight by weight, gives the same numbers."""
    smoothing, T = Smoothing(), len(rounds)
    before: dict[str, float] = {}
    for t, thetas in enumerate(rounds, start=1):
        for name, theta in thetas.items():
            if name not in before:
                before[name] = theta
                continue
            gamma = 1 - math.exp(-(theta * t) / (before[name] * T))
            gamma = min(max(gamma, 0.0), 0.999)
            before[name] = max(1e-12, gamma * before[name] + (1 - gamma) * theta)

        found = smoothing.update(thetas, t, T)

        assert found == pytest.approx(before, rel=1e-12)


def test_a_spike_is_held_back_and_a_fall_accepted() -> None:
    """As the paper's formula says: late a tenfold value moves little, a tenth moves all the way."""
    spike, fall, same = Smoothing(), Smoothing(), Smoothing()
    for one in (spike, fall, same):
        one.update({"w": 1.0}, 9, 10)

    assert spike.update({"w": 10.0}, 10, 10)["w"] < 1.01
    assert fall.update({"w": 0.1}, 10, 10)["w"] < 0.2
    assert same.update({"w": 1.0}, 10, 10)["w"] == pytest.approx(1.0)
    early = Smoothing()
    early.update({"w": 1.0}, 1, 1000)
    assert early.update({"w": 2.0}, 2, 1000)["w"] > 1.99


def test_weights_come_and_go() -> None:
    """A new weight starts with its value; one that nobody measured keeps its own; 0 is floored."""
    smoothing = Smoothing()
    smoothing.update({"b": 2.0}, 1, 4)

    assert smoothing.update({"a": 3.0}, 2, 4) == {"a": 3.0, "b": 2.0}
    assert smoothing.update({}, 3, 4) == {"a": 3.0, "b": 2.0}
    assert Smoothing().update({"a": 0.0}, 1, 4) == {"a": 1e-12}
    with pytest.raises(ValueError, match=r"round t must be in 1\.\.4, got 5"):
        smoothing.update({}, 5, 4)


def test_smoothing_goes_on_from_its_state() -> None:
    """A restored object gives the same bits."""
    smoothing, restored = Smoothing(), Smoothing()
    smoothing.update({"a": 3.0, "b": 0.1}, 1, 3)
    smoothing.update({"a": 2.0, "b": 0.2}, 2, 3)

    restored.load_state(smoothing.state())

    last = {"a": 2.5, "b": 0.3}
    assert restored.update(last, 3, 3) == smoothing.update(last, 3, 3)


def test_the_caps_are_options() -> None:
    """Without a cap a spike is held back for ever, as in the formula as printed."""
    printed = Smoothing(floor=0.0, most_gamma=1.0)
    printed.update({"w": 1.0}, 1, 1)

    assert printed.update({"w": 1e9}, 1, 1)["w"] == 1.0
