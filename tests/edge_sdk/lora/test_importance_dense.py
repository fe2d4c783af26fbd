"""Importance is what a dense float64 model says, wherever its blocks run and however it is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edge_sdk.lora.importance import Form, ImportanceMeter, combine, weight_of
from tests.edge_sdk.lora.measured import (
    FORMS,
    MAIN,
    SPLITS,
    WEIGHTS,
    check,
    dense,
    expected,
    known,
    make_engine,
    make_job,
    make_runtime,
    mean_loss,
    two_micros,
    wave,
)
from tests.tiny import (
    BLOCKS,
    FAMILIES,
    OTHERS,
    make_micro,
    make_model,
    num_targets,
    task_of,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_a_device_with_the_whole_model_equals_the_dense_reference(family: str, form: Form) -> None:
    """Padded micro-batches, adapted weights and bare ones, beside adapters and residuals."""
    micros, targets = two_micros(family)
    runtime = make_runtime(family, BLOCKS)
    runtime.state.meter.measure(form, 1)

    for index, micro in enumerate(micros):
        runtime.local(micro, targets, 0, index)
    runtime.step(0)

    steps = [[(1.0, dense(family, micro, targets))] for micro in micros]
    check(runtime.state.meter.take(), {n: expected(form, steps, n) for n in known(family).shapes})


@pytest.mark.parametrize("family", sorted({**FAMILIES, **OTHERS}.keys() - set(MAIN)))
def test_every_family_is_measured_by_the_same_code(family: str) -> None:
    """Eight more model families equal the dense reference, in every form."""
    micro = make_micro(task_of(family), 3)
    targets = num_targets(micro)
    runtime = make_runtime(family, BLOCKS)

    for form in FORMS:
        runtime.state.meter.measure(form, 1)
        runtime.local(micro, targets, 0, 0)
        runtime.step(0)

        steps = [[(1.0, dense(family, micro, targets))]]
        due = {n: expected(form, steps, n) for n in known(family).shapes}
        check(runtime.state.meter.take(), due)


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
    for meter in (runtime.state.meter, engine.trained.meter):
        meter.measure(form, 1)

    for index, micro in enumerate(micros):
        job = make_job("a", 2, micro, runtime.forward(micro, 0, index), 6.0, targets)
        if labels == "server":
            (answer,) = engine.train([job], 0, index)
        else:
            _, grad = runtime.tail(engine.forward([job], 0, index)["a", 0], micro, targets)
            (answer,) = engine.backward({("a", 0): grad})
        runtime.backward(answer.grad_BTD)
    runtime.step(0)
    engine.finish_step(0)

    steps = [[(1.0, dense(family, micro, targets))] for micro in micros]
    found = {**runtime.state.meter.take(), **engine.learned().importance}
    check(found, {n: expected(form, steps, n) for n in known(family).shapes})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_wave_is_measured_for_the_weighted_mean_loss(family: str, form: Form) -> None:
    """Each block's value is that of the mean over the devices served there, by their samples."""
    jobs, records, _ = wave(family)
    engine = make_engine(family, 1)
    engine.trained.meter.measure(form, 1)

    engine.train(jobs, 0, 0)
    engine.finish_step(0)

    due = {}
    for name in known(family).names(1, BLOCKS):
        here = [n for n, split in SPLITS.items() if split <= known(family).block_of(name)]
        total = sum(WEIGHTS[n] for n in here)
        shares = [(WEIGHTS[n] / total, records[n]) for n in here]
        due[name] = expected(form, [shares], name)
    check(engine.learned().importance, due)


def test_combined_reports_equal_the_pooled_loss() -> None:
    """Free form: devices and coordinator joined by shares give sum_i p_i L_i on one machine."""
    jobs, records, runtimes = wave("llama")
    engine, k = make_engine("llama", 1), known("llama")
    engine.trained.meter.measure("free", 1)
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
            "": (left, engine.learned().importance),
            **{n: (WEIGHTS[n] / total, r.state.meter.take()) for n, r in runtimes.items()},
        }
    )

    pooled = [(WEIGHTS[n] / total, r) for n, r in records.items()]
    check(found, {n: expected("free", [pooled], n) for n in sorted(k.shapes)})


def test_a_device_that_left_counts_nothing() -> None:
    """Who sends no gradient is in no value; a block that served nobody reports nothing."""
    jobs, records, runtimes = wave("llama")
    engine = make_engine("llama", 1, trains_head=False)
    engine.trained.meter.measure("free", 1)
    tops = engine.forward(jobs, 0, 0)
    micro = make_micro("causal-lm", 1, rows=3, longest=6)

    _, grad = runtimes["b"].tail(tops["b", 0], micro, num_targets(micro))
    engine.backward({("b", 0): grad})
    engine.finish_step(0)

    names = known("llama").names(SPLITS["b"], BLOCKS)
    check(
        engine.learned().importance,
        {n: expected("free", [[(1.0, records["b"])]], n) for n in names},
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_scale_of_float16_is_divided_out(form: Form) -> None:
    """In half precision the values are those of full precision, up to its rounding."""
    micro = make_micro("causal-lm", 0)
    found = []
    for compute in ("float32", "float16"):
        runtime = make_runtime("llama", BLOCKS, compute=compute)
        runtime.state.meter.measure(form, 1)
        runtime.local(micro, num_targets(micro), 0, 0)
        runtime.step(0)
        found.append(runtime.state.meter.take())

    check_rounded(*found)


@pytest.mark.parametrize("form", FORMS)
def test_the_coordinator_divides_its_loss_scale_out(form: Form) -> None:
    """Its values in half precision are those of full precision, up to rounding."""
    jobs, _, _ = wave("llama")
    found = []
    for compute in ("float32", "float16"):
        engine = make_engine("llama", 1, compute=compute)
        engine.trained.optimizer.loss_scale = min(
            256.0, engine.trained.optimizer.loss_scale
        )  # as if found
        engine.trained.meter.measure(form, 1)
        engine.train(jobs, 0, 0)
        engine.finish_step(0)
        found.append(engine.learned().importance)

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
    runtime.state.meter.measure("free", 1)
    for step, value in enumerate((1e-3, math.inf)):
        hidden = runtime.forward(micro, step, 0)
        runtime.backward(np.full_like(hidden, value))
        runtime.step(step)

    found = runtime.state.meter.take()

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
        meter = ImportanceMeter(model, k.shapes, form, 1)
        with meter.watching(0):
            loss = mean_loss(model, micro, num_targets(micro))
        loss.backward()
        meter.close_step(0)
        found.append(meter.take())

    check(found[0], found[1])
    assert min(found[1].values()) > 0


def test_the_weight_of_a_layer_is_dense_whatever_holds_it() -> None:
    """A plain layer shows its own weight, a quantised one a dense copy."""
    linear = nn.Linear(4, 3)

    assert weight_of(linear).data_ptr() == linear.weight.data_ptr()
    torch.testing.assert_close(weight_of(Halved(linear)), linear.weight.detach(), atol=5e-3, rtol=0)
