"""AdamW and SGD in numpy do what `training.Optimizer` does with torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.runtime.numpy_optimizer import NumpyOptimizer
from edge_sdk.runtime.training import Optimizer, TrainingConfig

SHAPES = {"w.A": (3, 7), "w.B": (5, 3)}
STEPS = 20


def pair(**settings: Any) -> tuple[Optimizer, NumpyOptimizer, dict[str, Any], dict[str, Any]]:
    """Both optimizers over equal parameters."""
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    tensors = {n: torch.nn.Parameter(torch.from_numpy(a.copy())) for n, a in arrays.items()}
    config = TrainingConfig(**{"learning_rate": 1e-2, **settings})
    return Optimizer(tensors, config, STEPS), NumpyOptimizer(arrays, config, STEPS), tensors, arrays


def give(both: tuple[Any, ...], seed: int, scale: float = 1.0) -> None:
    """Let both have the same gradients, in two parts."""
    _, plain, tensors, _ = both
    draw = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        parts = [(scale * draw.normal(size=shape)).astype(np.float32) for _ in range(2)]
        tensors[name].grad = torch.from_numpy(parts[0] + parts[1])
        for part in parts:
            plain.add_gradient(name, part)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "weight_decay": 0.1, "warmup_steps": 4, "max_grad_norm": 0.3},
        {"optimizer": "adamw", "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-3},
        {"optimizer": "adamw", "lr_scheduler_type": "cosine", "max_grad_norm": 0.0},
        {"optimizer": "sgd", "max_grad_norm": 0.5},
    ],
)
def test_every_setting_gives_torchs_numbers(settings: dict[str, Any]) -> None:
    """Parameters and moments agree after twenty steps with clipping, decay and schedule."""
    both = pair(**settings)
    reference, plain, tensors, arrays = both
    for step in range(STEPS):
        give(both, step)
        assert reference.step(step)
        assert plain.step(step)

    for name, array in arrays.items():
        np.testing.assert_allclose(array, tensors[name].detach().numpy(), rtol=1e-5, atol=1e-6)
    wanted, found = reference.state(), plain.state()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_moments_of_torch_are_gone_on_from() -> None:
    """A checkpoint does not tell which of the two has written it."""
    both = pair()
    reference, plain, tensors, arrays = both
    give(both, 0)
    plain.forget_gradients()
    reference.step(0)
    plain.load_state(reference.state())
    for name, array in arrays.items():
        array[...] = tensors[name].detach().numpy()

    give(both, 1)
    reference.step(1)
    plain.step(1)

    for name, array in arrays.items():
        np.testing.assert_allclose(array, tensors[name].detach().numpy(), rtol=1e-6, atol=1e-7)


def test_moments_that_do_not_fit_start_fresh() -> None:
    """Another shape, or a moment that is missing, is left out."""
    _, plain, _, _ = pair()
    state = {f"w.A.{m}": np.ones((2, 2), np.float32) for m in ("step", "exp_avg", "exp_avg_sq")}

    plain.load_state({**state, "w.B.exp_avg": np.ones(SHAPES["w.B"], np.float32)})

    assert plain.state() == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    """Nothing moves, and the next step is a normal one."""
    both = pair()
    _, plain, _, arrays = both
    before = {name: array.copy() for name, array in arrays.items()}
    plain.add_gradient("w.A", np.full(SHAPES["w.A"], bad, np.float32))

    assert not plain.step(0)
    assert plain.state() == {}
    assert all(np.array_equal(array, before[name]) for name, array in arrays.items())
    give(both, 0)
    assert plain.step(1)


def test_a_step_without_gradients_changes_nothing() -> None:
    """Neither parameters nor moments."""
    _, plain, _, arrays = pair(weight_decay=0.1)
    before = {name: array.copy() for name, array in arrays.items()}

    assert plain.step(0)

    assert plain.state() == {}
    assert all(np.array_equal(array, before[name]) for name, array in arrays.items())
