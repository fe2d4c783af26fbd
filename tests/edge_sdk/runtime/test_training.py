"""The schedule is transformers', the optimizer torch's, and both go on where they stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_scheduler

from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.precision import autocast, resolve_compute
from edge_sdk.runtime import training
from edge_sdk.runtime.training import (
    Optimizer,
    TrainingConfig,
    from_pairs,
    learning_rate,
    seed_step,
    to_pairs,
)

CONFIG = TrainingConfig(
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    weight_decay=0.1,
    adam_beta1=0.8,
    adam_beta2=0.99,
    adam_epsilon=1e-6,
    max_grad_norm=0.0,
)
CPU = torch.device("cpu")


def make_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Two parameters of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w.A": (3, 4), "w.B": (5, 3)}
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def set_gradients(
    parameters: dict[str, nn.Parameter], step: int, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Give every parameter a gradient that depends on the step only."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = grads[name] * scale
    return grads


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_rate_is_that_of_transformers(kind: Any, warmup: int) -> None:
    """Every step's learning rate equals the one transformers' scheduler sets."""
    config = TrainingConfig(learning_rate=2e-3, lr_scheduler_type=kind, warmup_steps=warmup)
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=20)

    for step in range(20):
        assert learning_rate(config, step, 20) == pytest.approx(
            theirs.param_groups[0]["lr"], rel=1e-12, abs=1e-18
        )
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_are_those_of_torch(kind: Any) -> None:
    """The same gradients and rates give the same bits as torch's own optimizer."""
    config = replace(CONFIG, optimizer=kind)
    ours, theirs = make_parameters(), make_parameters()
    optimizer = Optimizer(ours, config, total_steps=10)
    reference: torch.optim.Optimizer = torch.optim.SGD(theirs.values(), lr=1.0)
    if kind == "adamw":
        reference = torch.optim.AdamW(
            theirs.values(), betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1
        )

    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        assert optimizer.step(step)
        reference.param_groups[0]["lr"] = learning_rate(config, step, 10)
        reference.step()

    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(parameter.grad is None for parameter in ours.values())


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    """Moments that went through state() and a contiguous copy continue as if never stopped."""
    straight, first, second = make_parameters(), make_parameters(), make_parameters()
    one, two, three = (Optimizer(p, CONFIG, 10) for p in (straight, first, second))
    for step in range(4):
        for parameters, optimizer in ((straight, one), (first, two)):
            set_gradients(parameters, step)
            optimizer.step(step)

    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    three.load_state({key: np.ascontiguousarray(value) for key, value in two.state().items()})
    for step in range(4, 10):
        for parameters, optimizer in ((straight, one), (second, three)):
            set_gradients(parameters, step)
            optimizer.step(step)

    assert all(torch.equal(straight[name], second[name]) for name in straight)


def test_moments_that_no_longer_fit_start_fresh() -> None:
    """After a change of rank the fitting moments are kept and the others begin anew."""
    old = make_parameters()
    optimizer = Optimizer(old, CONFIG, 10)
    set_gradients(old, 0)
    optimizer.step(0)
    new = {"w.A": nn.Parameter(torch.zeros(2, 4)), "w.B": nn.Parameter(torch.zeros(5, 3))}
    changed = Optimizer(new, CONFIG, 10)

    changed.load_state(optimizer.state())

    assert {key.rpartition(".")[0] for key in changed.state()} == {"w.B"}


def test_state_is_a_copy() -> None:
    """Training on does not change a state that was taken."""
    parameters = make_parameters()
    optimizer = Optimizer(parameters, CONFIG, 10)
    set_gradients(parameters, 0)
    optimizer.step(0)
    taken = optimizer.state()
    state = {key: value.copy() for key, value in taken.items()}

    set_gradients(parameters, 1)
    optimizer.step(1)

    assert all(np.array_equal(taken[key], state[key]) for key in state)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_bounds_the_norm_over_all_parameters(limit: float) -> None:
    """Gradients are scaled by one factor to the limit; 0 and a large limit leave them alone."""
    config = TrainingConfig(optimizer="sgd", lr_scheduler_type="constant", max_grad_norm=limit)
    parameters = make_parameters()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = Optimizer(parameters, config, 10)
    grads = set_gradients(parameters, 0)

    optimizer.step(0)

    norm = float(torch.cat([g.flatten() for g in grads.values()]).norm())
    factor = min(1.0, limit / norm) if limit else 1.0
    for name, parameter in parameters.items():
        moved = (before[name] - parameter) / config.learning_rate
        torch.testing.assert_close(moved, grads[name] * factor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    """One NaN or infinity anywhere: parameters and moments stay, gradients are forgotten."""
    parameters = make_parameters()
    optimizer = Optimizer(parameters, CONFIG, 10)
    set_gradients(parameters, 0)
    optimizer.step(0)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    state = optimizer.state()
    set_gradients(parameters, 1)
    parameters["w.A"].grad[0, 0] = bad  # type: ignore[index]

    was_finite = optimizer.step(1)

    assert not was_finite
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    assert all(np.array_equal(value, state[key]) for key, value in optimizer.state().items())
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_loss_scale_cancels() -> None:
    """In float16 gradients come scaled and are applied unscaled, to the same bits."""
    plain, scaled = make_parameters(), make_parameters()
    one = Optimizer(plain, CONFIG, 10)
    two = Optimizer(scaled, CONFIG, 10, torch.float16)

    for step in range(3):
        set_gradients(plain, step)
        set_gradients(scaled, step, two.loss_scale)
        one.step(step)
        two.step(step)

    assert (one.loss_scale, two.loss_scale) == (1.0, 65536.0)
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_a_loss_scale_is_found_as_torch_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It halves at each overflow, which is no error, and doubles after enough good steps."""
    monkeypatch.setattr(training, "STEPS_TO_DOUBLE_SCALE", 7)
    parameters = make_parameters()
    optimizer = Optimizer(parameters, CONFIG, 10, torch.float16)
    theirs = torch.amp.GradScaler("cpu", growth_interval=7)
    other = torch.optim.SGD([weight := nn.Parameter(torch.zeros(1))], lr=0.0)
    overflows = {3, 4, 25}

    for step in range(60):
        bad = float("inf") if step in overflows else 0.0
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, bad)
        theirs.scale(weight.sum() * (bad or 1.0)).backward()
        theirs.step(other)
        theirs.update()
        other.zero_grad()
        assert optimizer.step(0)
        assert optimizer.loss_scale == theirs.get_scale(), step


def test_a_loss_scale_survives_a_restart() -> None:
    """A restored optimizer does not search for its loss scale again."""
    parameters = make_parameters()
    optimizer = Optimizer(parameters, CONFIG, 10, torch.float16)
    set_gradients(parameters, 0, float("inf"))
    optimizer.step(0)
    set_gradients(parameters, 1, optimizer.loss_scale)
    optimizer.step(1)
    restored = Optimizer(make_parameters(), CONFIG, 10, torch.float16)

    restored.load_state(optimizer.state())

    assert restored.loss_scale == optimizer.loss_scale == 32768.0
    assert restored.state().keys() == optimizer.state().keys()


def test_nothing_to_train_is_fine() -> None:
    """A side without adapters steps without doing anything."""
    optimizer = Optimizer({}, CONFIG, 10)

    optimizer.load_state({})
    optimizer.forget_gradients()

    assert optimizer.step(0)
    assert optimizer.state() == {}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        TrainingConfig(optimizer="sgd", seed=7),
        LoraConfig(target_modules=("q_proj", "v_proj"), use_rslora=True, lora_dropout=0.1),
    ],
)
def test_a_config_travels_as_strings(config: Any) -> None:
    """What is read back on the other side is what was sent."""
    assert from_pairs(type(config), to_pairs(config)) == config


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"momentum": "1"}, "unknown settings: momentum"),
        ({"seed": "one"}, "does not fit"),
        ({"learning_rate": "-1"}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pairs: dict[str, str], message: str) -> None:
    """A setting of another version is named, not ignored."""
    with pytest.raises(ConfigError, match=message):
        from_pairs(TrainingConfig, pairs)


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 0.0}, {"adam_epsilon": 0.0}, {"warmup_steps": -1}, {"max_grad_norm": -0.1}],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    """The message names the setting and its value."""
    (name,) = change
    with pytest.raises(ValueError, match=name):
        TrainingConfig(**change)


def test_compute_in_the_wanted_dtype() -> None:
    """`auto` is float32 on a CPU; a named dtype is taken and is what products are made in."""
    assert resolve_compute("auto", CPU) == torch.float32
    assert resolve_compute("bfloat16", CPU) == torch.bfloat16
    matrix = torch.eye(2)
    with autocast(torch.bfloat16, CPU):
        narrow = matrix @ matrix
    with autocast(torch.float32, CPU):
        wide = matrix @ matrix

    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)


def test_dropout_needs_no_saved_state() -> None:
    """The same place in the run draws the same numbers, another place others."""

    def draw(*where: int | str) -> float:
        seed_step(0, torch.device("cpu"), *where)
        return float(torch.rand(1))

    draws: Callable[..., float] = draw
    assert draws("device", 3, 1) == draws("device", 3, 1)
    assert len({draws("device", 3, 1), draws("device", 3, 2), draws("coordinator", 3, 1)}) == 3
