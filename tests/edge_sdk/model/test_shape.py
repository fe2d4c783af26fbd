"""What is read off a model without weights is what real slices and runtimes hold and compute."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from edge_sdk.lora.adapters import Adapters
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import Task, find_layout
from edge_sdk.model.partition import CPU, Slice, head_names
from edge_sdk.model.precision import autocast
from edge_sdk.model.shape import model_shape
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from profiler.estimate.flops import estimate_flops
from profiler.estimate.memory import adapter_bytes, estimate_memory
from profiler.estimate.sizes import ModelShape, Work
from profiler.sensors.memory import peak_rss, reset_peak_rss, rss
from tests.tiny import (
    BLOCKS,
    CLASSES,
    FAMILIES,
    OTHERS,
    layout_of,
    make_config,
    make_micro,
    make_model,
    make_parts,
    num_targets,
    task_of,
)

ALL = [*FAMILIES, *OTHERS]
ROWS, LENGTH, RANK = 3, 12, 2
aten: Any = torch.ops.aten


@cache
def shape_of(family: str) -> ModelShape:
    """The observed sizes of a tiny model."""
    return model_shape(make_config(family), task_of(family), layout_of(family))


@cache
def model_of(family: str) -> Any:
    """A tiny model with weights."""
    return make_model(make_config(family), task_of(family))


def make_slice(family: str, names: list[str], dtype: torch.dtype = torch.float32) -> Slice:
    """A slice with the named parts."""
    task: Task = task_of(family)
    slice_ = Slice(make_config(family), task, layout_of(family), dtype)
    for name, tensors in make_parts(model_of(family), layout_of(family), names).items():
        slice_.add(name, tensors)
    return slice_


def work_of(family: str, split: int, leaves: str = "", **changes: Any) -> Work:
    """A device's work with adapters on the weights whose names end so; "" is all of them."""
    model = shape_of(family)
    ranks = {
        f"{model.blocks_path}.{i}.{linear.name}": RANK
        for i in range(split)
        for linear in model.linears
        if any(linear.name.endswith(leaf) for leaf in leaves.split(","))
    }
    settings = {"has_front": True, "has_tail": False, "micro_batch": ROWS, "length": LENGTH}
    return Work(first=0, stop=split, ranks=ranks, **{**settings, **changes})


def forward(slice_: Slice, work: Work, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """Run the blocks of *work* on a hidden state that wants a gradient, or from the front."""
    lengths_B = torch.tensor([LENGTH, LENGTH - 4, 5])
    with autocast(compute, CPU):
        if work.has_front:
            ids_BT = torch.randint(3, 90, (ROWS, LENGTH))
            return slice_.front(ids_BT, lengths_B, work.stop)
        size = make_config("llama").hidden_size
        hidden_BTD = torch.randn(ROWS, LENGTH, size, dtype=slice_.dtype, requires_grad=True)
        return slice_.middle(hidden_BTD, lengths_B, work.first, work.stop)


def add_adapters(family: str, slice_: Slice, work: Work, dropout: float = 0.0) -> Adapters:
    """Put the adapters of *work* on a slice."""
    slice_.model.train()
    return Adapters(slice_, dict(work.ranks), {}, LoraConfig(r=RANK, lora_dropout=dropout))


def saved_bytes(slice_: Slice, work: Work, compute: torch.dtype = torch.float32) -> int:
    """Bytes that autograd keeps beside weights, counted once for each place in memory."""
    weights = [p for p in slice_.model.parameters() if not p.is_meta]
    known = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert forward(slice_, work, compute).requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in known)


# ---- parameters ----


@pytest.mark.parametrize("family", ALL)
def test_parameters_are_those_of_a_slice(family: str) -> None:
    """Front, blocks and tail count what a device of two blocks and the tail has in memory."""
    slice_ = make_slice(family, ["front", "block.1", "block.2", "tail"])
    present = sum(p.numel() for p in slice_.model.parameters() if not p.is_meta)
    work = work_of(family, 2, has_tail=True, base_bytes=1)

    found = estimate_memory(shape_of(family), work).base

    assert found == present
    assert shape_of(family).head_params == sum(
        slice_.model.get_parameter(name).numel() for name in head_names(slice_)
    )


@pytest.mark.parametrize("family", ALL)
def test_sizes_are_the_config_s(family: str) -> None:
    """What the config says of the model stands in the shape."""
    found, config = shape_of(family), make_config(family)

    assert found.num_blocks == BLOCKS
    assert found.hidden_size == 32
    assert found.num_heads == 4
    assert found.vocab_size == config.vocab_size
    assert found.num_labels == (0 if task_of(family) == "causal-lm" else CLASSES)
    assert found.attention_size == 32


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "phi", "modernbert"])
def test_linear_layers_are_those_that_can_be_adapted(family: str) -> None:
    """Names and sizes of one block's weights are those that `all-linear` finds."""
    task, found = task_of(family), shape_of(family)
    targets = find_targets(make_config(family), task, layout_of(family), LoraConfig())
    prefix = f"{found.blocks_path}.1."

    assert {(prefix + li.name, li.num_outputs, li.num_inputs) for li in found.linears} == {
        (name, *shape) for name, shape in targets.items() if name.startswith(prefix)
    }


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_runtime_holds_what_is_estimated(family: str, optimizer: Any) -> None:
    """Factors, gradients and moments of a device that holds everything, byte for byte."""
    task: Task = task_of(family)
    is_classifier = task == "sequence-classification"
    work = work_of(family, BLOCKS, has_tail=True, trains_head=is_classifier, optimizer=optimizer)
    layout, ranks = layout_of(family), dict(work.ranks)
    parts = make_parts(model_of(family), layout, list(layout.part_names()))
    plan = Plan(split=BLOCKS, ranks=ranks, alphas={}, batch_size=4, micro_batch=4, tail=True)
    config, training = make_config(family), TrainingConfig(optimizer=optimizer)
    runtime = TorchRuntime(config, task, layout, parts, plan, LoraConfig(), training, 9)
    micro = make_micro(task, 0)
    runtime.local(micro, num_targets(micro), 0, 0)
    trained = [*runtime.state.adapters.parameters().values(), *runtime.state._head.values()]
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)

    runtime.step(0)

    found = estimate_memory(shape_of(family), work)
    moments = {n: m for n, m in runtime.state.moments().items() if not n.endswith(".step")}
    assert found.adapters == sum(p.nbytes for p in runtime.state.adapters.parameters().values())
    assert found.gradients == gradients
    assert found.optimizer == sum(np.asarray(m).nbytes for m in moments.values())


# ---- activations ----

WIDTHS = {
    (4, 4): (torch.float32, torch.float32),
    (2, 2): (torch.bfloat16, torch.bfloat16),
    (4, 2): (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "gemma3_text", "phi", "modernbert"])
def test_activations_are_what_autograd_keeps(family: str, widths: tuple[int, int]) -> None:
    """Two blocks in the middle, every weight adapted: within 3 % of what is saved, 5 % if mixed.

    Rotary tables and masks, which all blocks share, are not counted in the estimate.
    """
    base, compute = WIDTHS[widths]
    work = work_of(family, 3, base_bytes=widths[0], compute_bytes=widths[1])
    prefix = f"{shape_of(family).blocks_path}.0."
    ranks = {name: rank for name, rank in work.ranks.items() if not name.startswith(prefix)}
    work = replace(work, first=1, has_front=False, ranks=ranks)
    slice_ = make_slice(family, ["block.1", "block.2"], base)
    add_adapters(family, slice_, work)

    saved = saved_bytes(slice_, work, compute)

    expected = estimate_memory(shape_of(family), work).activations
    assert expected == pytest.approx(saved, rel=0.05 if base != compute else 0.03)


@pytest.mark.parametrize(
    ("leaves", "dropout"),
    [("q_proj,v_proj", 0.0), ("o_proj", 0.0), ("down_proj", 0.0), ("q_proj,v_proj,o_proj", 0.1)],
)
def test_an_adapter_keeps_its_input_where_nobody_else_does(leaves: str, dropout: float) -> None:
    """Shared inputs are kept once, attention's output is there anyway, dropout copies: to a byte.

    The price of one adapter is what is kept and what is trained.
    """
    work = work_of("llama", 2, leaves, has_front=False, has_lora_dropout=dropout > 0)
    slices = [make_slice("llama", ["block.0", "block.1"]) for _ in range(2)]
    add_adapters("llama", slices[0], work, dropout)
    frozen = work_of("llama", 2, "nothing", has_front=False)

    saved = [saved_bytes(slice_, work) for slice_ in slices]

    model = shape_of("llama")
    first, second = estimate_memory(model, work), estimate_memory(model, frozen)
    assert first.activations - second.activations == saved[0] - saved[1]
    if "," not in leaves:
        (linear,) = (li for li in model.linears if li.name.endswith(leaves))
        trained = 16 * RANK * (linear.num_inputs + linear.num_outputs)
        price = adapter_bytes(linear, RANK, ROWS * LENGTH, fragmentation=0.0)
        assert 2 * price == saved[0] - saved[1] + 2 * trained


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("leaves", ["", "c_fc,up_proj,output.dense"])
def test_a_device_keeps_no_more_than_is_estimated(family: str, leaves: str) -> None:
    """From the front on, the lowest adapted block counts as a whole: an upper bound, by a block."""
    work = work_of(family, 3, leaves)
    slice_ = make_slice(family, ["front", "block.0", "block.1", "block.2"])
    add_adapters(family, slice_, work)

    saved = saved_bytes(slice_, work)

    found = estimate_memory(shape_of(family), work).activations
    assert found * 2 / 3 <= saved <= found * 1.03


def test_dropout_in_the_model_is_seen() -> None:
    """Dropout keeps its noise, and scores where attention drops too; looking draws no number."""
    config = make_config("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    generator = torch.get_rng_state()
    found = model_shape(config, "sequence-classification", layout_of("bert"))

    calm, noisy = shape_of("bert").kept[0], found.kept[0]

    assert torch.equal(torch.get_rng_state(), generator)
    assert noisy.per_token > calm.per_token
    assert noisy.per_pair >= calm.per_pair + 4 * 4  # scores of four heads


def test_looking_takes_no_memory_for_weights() -> None:
    """A block of 240 MiB is observed in less, although autocast copies it in half the width."""
    config = make_config(
        "llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
    )
    layout = find_layout(config, "causal-lm")
    if not reset_peak_rss():
        pytest.skip("this kernel does not let a process reset its peak")
    before = rss().value or 0

    found = model_shape(config, "causal-lm", layout)

    assert 4 * found.block_params > 230 * 2**20
    assert (peak_rss().value or 0) - before < 4 * found.block_params


# ---- operations ----


def count(slice_: Slice, work: Work) -> tuple[int, int]:
    """Operations that torch counts in the forward and in the backward pass."""
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward_counter:
        hidden = forward(slice_, work)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward_counter:
        hidden.sum().backward()  # type: ignore[no-untyped-call]
    return forward_counter.get_total_flops(), backward_counter.get_total_flops()


def _attention(q: Any, k: Any, v: Any, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


@pytest.mark.parametrize("has_front", [True, False])
@pytest.mark.parametrize("leaves", ["", "c_attn,q_proj,query,Wqkv"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "modernbert"])
def test_operations_are_those_that_torch_counts(family: str, leaves: str, has_front: bool) -> None:
    """Forward and backward of three blocks, within 2 %."""
    work = work_of(family, 3, leaves, has_front=has_front)
    slice_ = make_slice(family, ["front", "block.0", "block.1", "block.2"])
    add_adapters(family, slice_, work)

    forward_flops, backward_flops = count(slice_, work)

    found = estimate_flops(shape_of(family), work)
    assert found.forward == pytest.approx(forward_flops, rel=0.02)
    assert found.backward == pytest.approx(backward_flops, rel=0.02)


def test_operations_of_the_head_are_those_that_torch_counts() -> None:
    """Head and final norm of a causal model, in both passes, exactly."""
    slice_ = make_slice("llama", ["front", "tail"])
    top_BTD = torch.randn(ROWS, LENGTH, 32, requires_grad=True)
    lengths_B = torch.full((ROWS,), LENGTH)
    with FlopCounterMode(display=False) as forward_counter:
        logits = slice_.logits(top_BTD, lengths_B, BLOCKS)
    with FlopCounterMode(display=False) as backward_counter:
        logits.sum().backward()  # type: ignore[no-untyped-call]
    work = Work(
        first=BLOCKS,
        stop=BLOCKS,
        has_front=False,
        has_tail=True,
        ranks={},
        micro_batch=ROWS,
        length=LENGTH,
    )

    found = estimate_flops(shape_of("llama"), work)

    assert found.forward == forward_counter.get_total_flops()
    assert found.backward == backward_counter.get_total_flops()
