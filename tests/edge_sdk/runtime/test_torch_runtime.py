"""A device's runtime goes on exactly where it stopped, and holds dW after every change."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.errors import NumericError
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime, pick_device
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.runtime.transfers import StreamTransfers
from tests.edge_sdk.runtime.late_streams import LateStreams
from tests.tiny import BLOCKS, make_config, make_micro, make_model, make_parts, num_targets, task_of

LORA = LoraConfig(r=3, lora_alpha=6.0, lora_dropout=0.1)


@cache
def known(family: str) -> Any:
    """What all runtimes of a family share."""
    config, task = make_config(family), task_of(family)
    layout = find_layout(config, task)
    return config, task, layout, make_model(config, task), find_targets(config, task, layout, LORA)


def make_runtime(family: str, split: int = BLOCKS, rank: int = 3, **options: Any) -> TorchRuntime:
    """A device with the tail."""
    config, task, layout, model, shapes = known(family)
    names = ["front", *(f"block.{i}" for i in range(split)), "tail"]
    prefixes = tuple(f"{layout.blocks_path}.{i}." for i in range(split))
    ranks = {n: rank for n in shapes if n.startswith(prefixes)}
    plan = Plan(split=split, ranks=ranks, alphas={}, batch_size=4, micro_batch=4, tail=True)
    parts = make_parts(model, layout, names)
    training = TrainingConfig(learning_rate=1e-2)
    torch.manual_seed(0)  # PEFT draws the first factors
    return TorchRuntime(
        config, task, layout, parts, plan, LORA, training, 10, device="cpu", **options
    )


def train(runtime: TorchRuntime, family: str, steps: range) -> list[float]:
    """Whole steps on the device alone; returns the losses."""
    losses = []
    for step in steps:
        micro = make_micro(task_of(family), step)
        losses.append(runtime.local(micro, num_targets(micro), step, 0).loss_sum)
        runtime.step(step)
    return losses


def random_change(family: str) -> dict[str, Factors]:
    """A change of dW for some weights."""
    generator = np.random.default_rng(0)
    found = {}
    for name, shape in list(known(family)[4].items())[::2]:
        b_OR = generator.normal(0, 0.1, (shape.num_outputs, 2)).astype(np.float32)
        a_RI = generator.normal(0, 0.1, (2, shape.num_inputs)).astype(np.float32)
        found[name] = Factors(b_OR, a_RI)
    return found


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_restored_device_goes_on_bit_for_bit(family: str) -> None:
    """Factors, residuals, head, moments and dropout continue as if never stopped."""
    straight, stopped = make_runtime(family), make_runtime(family)
    for runtime in (straight, stopped):
        runtime.state.begin_round()
        train(runtime, family, range(2))
        runtime.state.merge_change(random_change(family))
        runtime.state.begin_round()
    restored = make_runtime(family)

    restored.state.restore(
        {name: value.copy() for name, value in stopped.state.checkpoint().items()}
    )

    assert train(straight, family, range(2, 4)) == train(restored, family, range(2, 4))
    first, second = straight.state.checkpoint(), restored.state.checkpoint()
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_change_is_dw_less_what_was_learned_here() -> None:
    """After a round residual plus own adapter is what it was at the start, plus the change."""
    runtime, change = make_runtime("llama"), random_change("llama")

    def held(name: str) -> Any:
        total = runtime.state.adapters.products()[name].dense().astype(np.float64)
        if name in runtime.state.adapters.residual:
            total = total + runtime.state.adapters.residual[name].dense()
        return total

    for round_ in range(3):
        runtime.state.begin_round()
        before = {name: held(name) for name in change}
        train(runtime, "llama", range(2 * round_, 2 * round_ + 2))
        runtime.state.merge_change(change)
        for name, factors in change.items():
            np.testing.assert_allclose(held(name), before[name] + factors.dense(), atol=2e-6)


@pytest.mark.parametrize("split", [1, 3])
def test_forward_and_tail_evaluate_without_dropout(split: int) -> None:
    """Evaluation gives the same numbers every time and leaves no gradients."""
    runtime, micro = make_runtime("llama", split), make_micro("causal-lm", 0)

    first, second = runtime.forward_eval(micro), runtime.forward_eval(micro)
    sums = runtime.tail_eval(first, micro)

    assert np.array_equal(first, second)
    assert sums == runtime.tail_eval(second, micro)
    assert sums.num_targets == num_targets(micro)
    assert not [p for p in runtime.state.adapters.parameters().values() if p.grad is not None]


def test_a_gradient_that_is_not_finite_is_an_error_and_changes_nothing() -> None:
    """The step is named, and factors and moments stay."""
    runtime, micro = make_runtime("llama", 2), make_micro("causal-lm", 0)
    before = {name: value.copy() for name, value in runtime.state.checkpoint().items()}
    hidden = runtime.forward(micro, 3, 0)
    runtime.backward(np.full_like(hidden, np.nan))

    with pytest.raises(NumericError, match="step 3: a gradient"):
        runtime.step(3)

    assert all(
        np.array_equal(value, before[name]) for name, value in runtime.state.checkpoint().items()
    )


def test_a_device_without_adapters_passes_gradients_by() -> None:
    """Rank 0 everywhere: nothing to train, nothing fails."""
    runtime, micro = make_runtime("llama", 2, rank=0), make_micro("causal-lm", 0)

    runtime.backward(np.ones_like(runtime.forward(micro, 0, 0)))
    runtime.step(0)

    assert runtime.state.adapters.pairs() == {}


def test_a_base_in_half_precision_trains_in_full() -> None:
    """The frozen base may be bfloat16; factors and what travels are float32."""
    runtime = make_runtime("llama", 2, base="bfloat16", compute="bfloat16")
    micro = make_micro("causal-lm", 0)

    hidden = runtime.forward(micro, 0, 0)
    runtime.backward(np.ones_like(hidden))
    runtime.step(0)

    assert hidden.dtype == np.float32
    assert {p.dtype for p in runtime.state.adapters.parameters().values()} == {torch.float32}


def test_a_device_is_picked_by_name() -> None:
    """`auto` takes what there is."""
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_blocks_that_are_computed_again_give_the_same_bits(family: str) -> None:
    """With dropout and while importance is measured: factors, hidden states and values."""
    found = []
    for recompute in (False, True):
        runtime = make_runtime(family, split=2, recompute=recompute)
        runtime.state.begin_round()
        runtime.state.meter.measure("free", 2)
        hidden = []
        for step in range(4):
            for index in range(2):
                micro = make_micro(task_of(family), 2 * step + index)
                hidden.append(runtime.forward(micro, step, index))
                _, grad_BTD = runtime.tail(hidden[-1], micro, num_targets(micro))
                torch.manual_seed(99)  # whatever has drawn numbers in between
                runtime.backward(grad_BTD)
            runtime.step(step)
        found.append((hidden, runtime.state.checkpoint(), runtime.state.meter.take()))
    (hidden, state, importance), (again, state_again, importance_again) = found

    assert all(np.array_equal(a, b) for a, b in zip(hidden, again, strict=True))
    assert state.keys() == state_again.keys()
    assert all(np.array_equal(state[name], state_again[name]) for name in state)
    assert importance == importance_again
    assert len(importance) > 0


def test_a_device_that_computes_again_keeps_no_graph_while_it_waits() -> None:
    """Between forward and backward no tensor of the blocks is left; a given-up step leaves none."""
    runtime = make_runtime("llama", split=2, recompute=True)
    micro = make_micro(task_of("llama"), 0)

    def graphs() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum(tensor.grad_fn is not None for tensor in tensors)

    before = graphs()
    hidden = runtime.forward(micro, 0, 0)
    assert graphs() == before
    runtime.state.begin_round()
    with pytest.raises(AssertionError, match="backward without forward"):
        runtime.backward(np.zeros_like(hidden))


def test_copies_beside_the_computation_change_nothing() -> None:
    """Where every copy is made as late as it may, a device's step gives the same bits."""
    plain, late = make_runtime("llama", split=2), make_runtime("llama", split=2)
    late._transfers = StreamTransfers(torch.device("cpu"), LateStreams())
    micro = make_micro("causal-lm", 0)

    def numbers(runtime: TorchRuntime) -> list[np.ndarray]:
        hidden_BTD = runtime.forward(micro, 0, 0)
        sums, grad_BTD = runtime.tail(hidden_BTD, micro, num_targets(micro))
        runtime.backward(grad_BTD)
        runtime.step(0)
        return [hidden_BTD, grad_BTD, np.array(sums), runtime.forward_eval(micro)]

    for found, expected in zip(numbers(late), numbers(plain), strict=True):
        assert np.array_equal(found, expected)
