"""Optimizer moments of adapters whose rank changed are those that the optimizer would have had."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordinator.aggregation.rules import resize_pair
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.optimizer_state import fitted
from edge_sdk.lora.targets import Shape
from edge_sdk.runtime.training import Optimizer, TrainingConfig

SHAPE = Shape(6, 5)
ALPHA = 8.0
CONFIG = TrainingConfig(lr_scheduler_type="constant", max_grad_norm=0.0)


def scale(_weight: str, rank: int) -> float:
    """As LoRA has it."""
    return ALPHA / rank


def optimizer(pair: Pair) -> tuple[Optimizer, dict[str, torch.nn.Parameter]]:
    """AdamW over one pair."""
    parameters = {
        f"w.{letter}": torch.nn.Parameter(torch.from_numpy(factor.copy()))
        for letter, factor in (("A", pair.a_RI), ("B", pair.b_OR))
    }
    return Optimizer(parameters, CONFIG, 100), parameters


def train(pair: Pair, steps: int) -> tuple[Pair, dict[str, np.ndarray]]:
    """Some steps on a quadratic loss of s B A; the factors and the moments then."""
    own, parameters = optimizer(pair)
    wanted = torch.linspace(-1, 1, 30).reshape(SHAPE)
    for step in range(steps):
        product = scale("w", pair.a_RI.shape[0]) * parameters["w.B"] @ parameters["w.A"]
        ((product - wanted) ** 2).sum().backward()
        own.step(step)
    a, b = (parameters[f"w.{letter}"].detach().numpy() for letter in "AB")
    return Pair(a, b), own.state()


@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_kept_ranks_keep_their_moments(new: int) -> None:
    """Ranks that stay have the moments that the changed scale would have given them; A's stay."""
    pair, moments = train(initial_pair("w", 3, SHAPE, 0), steps=5)

    found = fitted(moments, {"w": new}, scale)

    kept, ratio = min(3, new), 3 / new
    assert found["w.A.exp_avg"].shape == (new, 5)
    np.testing.assert_array_equal(found["w.A.exp_avg"][:kept], moments["w.A.exp_avg"][:kept])
    np.testing.assert_allclose(
        found["w.B.exp_avg"][:, :kept], ratio * moments["w.B.exp_avg"][:, :kept], rtol=1e-6
    )
    np.testing.assert_allclose(
        found["w.B.exp_avg_sq"][:, :kept],
        ratio**2 * moments["w.B.exp_avg_sq"][:, :kept],
        rtol=1e-6,
    )
    assert not found["w.A.exp_avg_sq"][kept:].any()
    own, _ = optimizer(resize_pair(pair, initial_pair("w", new, SHAPE, 0), new / 3))
    own.load_state(found)
    assert own.state().keys() == moments.keys()


def test_gradients_scale_as_the_moments_do() -> None:
    """With more ranks and the same s B A, dL/dA stays and dL/dB grows as the scale does."""
    pair, _ = train(initial_pair("w", 3, SHAPE, 0), steps=5)
    larger = resize_pair(pair, initial_pair("w", 6 - 1, SHAPE, 0), 5 / 3)
    grads = []
    for held in (pair, larger):
        _, parameters = optimizer(held)
        rank = held.a_RI.shape[0]
        product = scale("w", rank) * parameters["w.B"] @ parameters["w.A"]
        ((product - 1.0) ** 2).sum().backward()
        grads.append({n: p.grad.numpy() for n, p in parameters.items() if p.grad is not None})

    small, large = grads
    np.testing.assert_allclose(large["w.A"][:3], small["w.A"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(large["w.B"][:, :3], small["w.B"] * 3 / 5, rtol=1e-4, atol=1e-5)


def test_an_unchanged_plan_changes_no_bit() -> None:
    """Moments of unchanged ranks, of other weights and of heads are passed on as they are."""
    _, moments = train(initial_pair("w", 3, SHAPE, 0), steps=3)
    moments["score.weight.exp_avg"] = np.ones((2, 2), np.float32)

    found = fitted(moments, {"w": 3}, scale)

    assert found.keys() == moments.keys()
    assert all(found[name] is moments[name] for name in moments)
