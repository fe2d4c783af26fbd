"""Measuring leaves nothing behind, changes no bit of the training and holds little memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edge_sdk.lora.importance import Form
from edge_sdk.runtime.training import TrainingConfig
from tests.edge_sdk.lora.measured import (
    FORMS,
    MAIN,
    known,
    make_runtime,
)
from tests.tiny import (
    BLOCKS,
    make_micro,
    num_targets,
    task_of,
)


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
    runtime.state.meter.measure(form, 2)
    model = runtime.slice.model

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
    assert runtime.state.meter.take().keys() == set(known("gpt2").names(0, 2))
    one(5)
    assert runtime.state.meter.take() == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_measuring_changes_no_bit_of_the_training(family: str, form: Form) -> None:
    """Losses, factors and moments are the same bits with and without it."""
    training, found = TrainingConfig(learning_rate=1e-2), []
    for every in (0, 1):
        runtime = make_runtime(family, BLOCKS, training)
        runtime.state.meter.measure(form, every)
        losses = []
        for step in range(2):
            micro = make_micro(task_of(family), step)
            losses.append(runtime.local(micro, num_targets(micro), step, 0))
            runtime.step(step)
        runtime.state.meter.take()
        found.append((losses, runtime.state.checkpoint()))

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
    runtime.state.meter.measure("reference", 1)
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
        runtime.state.meter.measure("free", every)
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
