"""Where float16 has no room, a device and the coordinator go on in bfloat16, and say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from coordinator.engine.interface import Answer, Job
from coordinator.engine.local import LocalEngine
from edge_sdk.lora.factors import Array
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import Layout, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime import training
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from tests.tiny import make_config, make_micro, make_model, make_parts, num_targets

BLOCKS, SPLIT, WIDE_BLOCK = 4, 3, 1
CONFIG: Any = make_config("llama", num_hidden_layers=BLOCKS)
LAYOUT: Layout = find_layout(CONFIG, "causal-lm")
LORA = LoraConfig(r=2, lora_alpha=4)
SETTINGS = TrainingConfig(learning_rate=1e-3)
MICRO = make_micro("causal-lm", 0)
TARGETS = num_targets(MICRO)


def parts(size: float) -> dict[str, Any]:
    """A tiny model in which one block makes numbers of about *size*."""
    model = make_model(CONFIG, "causal-lm")
    factor = (size / 1e-3) ** 0.5  # of two weights, each of which float16 can hold
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            weight = model.get_parameter(f"model.layers.{WIDE_BLOCK}.mlp.{name}.weight")
            weight *= factor
    return make_parts(model, LAYOUT, list(LAYOUT.part_names()))


def ranks(first: int, stop: int) -> dict[str, int]:
    """An adapter on every weight of some blocks."""
    prefixes = tuple(f"{LAYOUT.blocks_path}.{index}." for index in range(first, stop))
    targets = find_targets(CONFIG, "causal-lm", LAYOUT, LORA)
    return {name: LORA.r for name in targets if name.startswith(prefixes)}


def device(size: float, compute: Any, split: int = SPLIT, **options: Any) -> TorchRuntime:
    """A device with the first blocks and the tail."""
    held = ranks(0, split)
    plan = Plan(split=split, ranks=held, alphas={}, batch_size=4, micro_batch=4, tail=True)
    names = ("front", "tail", *(f"block.{index}" for index in range(split)))
    own = {name: tensors for name, tensors in parts(size).items() if name in names}
    return TorchRuntime(
        *(CONFIG, "causal-lm", LAYOUT, own, plan, LORA, SETTINGS, 10),
        device="cpu",
        compute=compute,
        **options,
    )


def step(runtime: TorchRuntime, number: int) -> list[Array]:
    """What a device computes in a step, its trained factors at the end."""
    top = runtime.forward(MICRO, number, 0)
    _, grad = runtime.tail(top, MICRO, TARGETS)
    runtime.backward(grad)
    runtime.step(number)
    return [top, grad, *(f for pair in runtime.state.adapters.pairs().values() for f in pair)]


def same(left: list[Array], right: list[Array]) -> bool:
    """Whether all arrays agree to the bit."""
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("base", ["float32", "float16"])
def test_a_device_goes_on_in_bfloat16(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With the bits of one that was told so, once it has named block and number; and restarts so.

    A loss scale, which float16 keeps, is a power of two.
    """
    half, told = device(1e6, "float16", base=base), device(1e6, "bfloat16", base=base)

    tops = [(half.forward_eval(MICRO), told.forward_eval(MICRO))]
    tops += [(half.forward(MICRO, 0, 0), told.forward(MICRO, 0, 0))]

    assert all(np.isfinite(top).all() and np.array_equal(top, other) for top, other in tops)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"float16.overflow block={WIDE_BLOCK} largest=")
    assert float(said.split("largest=")[1].split()[0]) > 65504
    again = device(1.0, "float16", base=base)  # which would have room
    again.state.restore(half.state.checkpoint())
    plain = device(1.0, "bfloat16", base=base)
    assert np.array_equal(again.forward_eval(MICRO), plain.forward_eval(MICRO))


def test_a_device_learns_where_float16_has_no_room() -> None:
    """What it sends is finite and every step is taken, cut and with the whole model."""
    for runtime in (device(1e6, "float16"), device(1e6, "float16", split=BLOCKS)):
        before = [f for pair in runtime.state.adapters.pairs().values() for f in pair]
        found = step(runtime, 0)
        assert all(np.isfinite(array).all() for array in found)
        assert not same(before, found[2:])


def test_numbers_that_fit_stay_in_float16(caplog: pytest.LogCaptureFixture) -> None:
    """To the bit what autocast gives, and nothing is said."""
    runtime = device(1.0, "float16")
    slice_ = Slice(CONFIG, "causal-lm", LAYOUT, torch.float32)
    for name, tensors in parts(1.0).items():
        slice_.add(name, tensors)
    ids_BT, lengths_B = torch.from_numpy(MICRO.input_ids), torch.from_numpy(MICRO.lengths)

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        expected = slice_.front(ids_BT, lengths_B, SPLIT).float().numpy()

    assert np.array_equal(runtime.forward_eval(MICRO), expected)
    assert caplog.text == ""


def engine(size: float, compute: Any) -> LocalEngine:
    """The coordinator with all blocks but the first."""
    slice_ = Slice(CONFIG, "causal-lm", LAYOUT, torch.float32)
    for name, tensors in parts(size).items():
        slice_.add(name, tensors)
    settings = SETTINGS
    own = LocalEngine(
        slice_, 1, ranks(1, BLOCKS), LORA, settings, 10, trains_head=False, compute=compute
    )
    own.trained.begin_round()
    return own


def job(*, has_labels: bool) -> Job:
    """A device's micro-batch."""
    hidden = np.random.default_rng(0).normal(size=(*MICRO.input_ids.shape, 32)).astype(np.float32)
    labels = MICRO.labels if has_labels else None
    return Job("a", 1, 4.0, TARGETS, hidden, MICRO.lengths, labels)


def wave(own: LocalEngine, *, has_labels: bool) -> Answer:
    """A training step of the coordinator with one device, in either label mode."""
    asked = job(has_labels=has_labels)
    if has_labels:
        answers = own.train([asked], 0, 0)
    else:
        top = own.forward([asked], 0, 0)["a", 0]
        answers = own.backward({("a", 0): top / np.abs(top).max() / TARGETS})
    assert own.finish_step(0)
    return answers[0]


@pytest.mark.parametrize("has_labels", [True, False], ids=["server", "device"])
def test_the_coordinator_goes_on_in_bfloat16(
    has_labels: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No device is blamed for what it sent: it gets the gradient of a coordinator told so."""
    half, told = (wave(engine(1e6, c), has_labels=has_labels) for c in ("float16", "bfloat16"))

    assert np.isfinite(half.grad_BTD).all()
    np.testing.assert_allclose(half.grad_BTD, told.grad_BTD, rtol=1e-5, atol=1e-12)
    assert half.sums == told.sums
    assert f"block={WIDE_BLOCK} " in caplog.text


def test_the_coordinator_evaluates_where_float16_has_no_room() -> None:
    """Both kinds of evaluation give what bfloat16 gives."""
    half, told = engine(1e6, "float16"), engine(1e6, "bfloat16")

    assert half.evaluate_whole(MICRO) == told.evaluate_whole(MICRO)
    assert half.evaluate(job(has_labels=True)) == told.evaluate(job(has_labels=True))


@pytest.mark.parametrize("has_labels", [True, False], ids=["server", "device"])
def test_a_loss_scale_that_is_too_large_is_nobodys_fault(
    has_labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is halved until the gradient is finite, and that is the one of a scale that fits."""
    right = wave(engine(1.0, "float16"), has_labels=has_labels)
    monkeypatch.setattr(training, "FIRST_LOSS_SCALE", 2.0**40)

    found = wave(engine(1.0, "float16"), has_labels=has_labels)

    assert np.isfinite(found.grad_BTD).all()
    largest = np.abs(right.grad_BTD).max()
    np.testing.assert_allclose(found.grad_BTD, right.grad_BTD, atol=2e-3 * largest)


def test_a_devices_tail_lowers_its_loss_scale_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sends up is finite, for the coordinator cannot wait for the next step."""
    right = device(1.0, "float16")
    top = right.forward_eval(MICRO)
    expected = right.tail(top, MICRO, TARGETS)[1]
    monkeypatch.setattr(training, "FIRST_LOSS_SCALE", 2.0**60)

    found = device(1.0, "float16").tail(top, MICRO, TARGETS)[1]

    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=2e-3 * largest)
