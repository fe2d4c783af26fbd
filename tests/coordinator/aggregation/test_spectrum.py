"""Energy of dW by rank: that of the dense matrices, by numpy's own singular values."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.spectrum import energy_within
from edge_sdk.lora.factors import Factors, zero


def drawn(seed: int, rank: int, *stack: int) -> Factors:
    """A matrix of that rank, or a stack of them."""
    draws = np.random.default_rng(seed)
    b_OR = draws.standard_normal((*stack, 7, rank)).astype(np.float32)
    return Factors(b_OR, draws.standard_normal((*stack, rank, 9)).astype(np.float32))


@pytest.mark.parametrize(
    "totals",
    [[drawn(0, 3)], [drawn(1, 1), drawn(2, 5), zero(7, 9)], [drawn(3, 2, 4)], [drawn(4, 12)]],
)
def test_shares_are_those_of_the_dense_matrices(totals: list[Factors]) -> None:
    """Within the 1, 2, 4, ... largest singular values of each weight, until that is all."""
    energy = np.zeros(7)
    for factors in totals:
        values = np.linalg.svd(factors.dense().astype(np.float64), compute_uv=False)
        energy += (values**2).reshape(-1, 7).sum(axis=0)

    found = energy_within(totals)

    expected = [energy[: 2**at].sum() / energy.sum() for at in range(len(found))]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[-1] == pytest.approx(1.0)
    assert len(found) == 1 or found[-2] < 1.0 - 1e-9


def test_nothing_learned_has_no_energy() -> None:
    """Before the first round there is nothing to share out."""
    assert energy_within([]) == energy_within([zero(7, 9)]) == []
