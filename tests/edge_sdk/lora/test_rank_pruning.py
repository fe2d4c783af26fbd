"""HetLoRA's penalty has the gradient of its formula, and cuts off what has faded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.rank_pruning import add_penalty, kept_rank, pruned_rank


def test_the_gradient_is_that_of_the_formula() -> None:
    """Lambda |B_tail| |A_tail| by autograd gives the same gradient, on top of the loss's own."""
    torch.manual_seed(0)
    factors = {
        "w.A": torch.nn.Parameter(torch.randn(4, 5)),
        "w.B": torch.nn.Parameter(torch.randn(3, 4)),
    }
    for parameter in factors.values():
        parameter.grad = torch.ones_like(parameter)

    add_penalty(factors, {"w": 4}, 0.3, 0.5)

    copies = {n: p.detach().clone().requires_grad_(True) for n, p in factors.items()}
    loss = 0.3 * torch.linalg.norm(copies["w.B"][:, 2:]) * torch.linalg.norm(copies["w.A"][2:])
    loss.backward()
    for name, parameter in factors.items():
        expected = copies[name].grad
        assert expected is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 1.0 + expected)


@pytest.mark.parametrize(
    ("rank", "gamma", "kept"), [(100, 0.99, 99), (8, 0.99, 8), (8, 0.5, 4), (1, 0.1, 1)]
)
def test_kept_ranks(rank: int, gamma: float, kept: int) -> None:
    """The kept rank is the nearest whole rank, and never 0."""
    assert kept_rank(rank, gamma) == kept


@pytest.mark.parametrize(("factor", "rank"), [(0.9, 2), (1.1, 4)])
def test_a_tail_that_faded_is_cut_off(factor: float, rank: int) -> None:
    """Where training has made |B_tail| |A_tail| smaller the rank becomes r', else it stays."""
    before = Pair(np.ones((4, 5), np.float32), np.ones((3, 4), np.float32))
    after = Pair(before.a_RI * np.float32(factor), before.b_OR)

    assert pruned_rank(before, after, 0.5) == rank


def test_a_tail_that_never_was_stays() -> None:
    """In the first round B is 0 before: nothing has faded."""
    before = Pair(np.ones((4, 5), np.float32), np.zeros((3, 4), np.float32))
    after = Pair(before.a_RI, np.ones((3, 4), np.float32))

    assert pruned_rank(before, after, 0.5) == 4
