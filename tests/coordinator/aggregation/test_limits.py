"""What is beyond all measure is found; what honest devices bring is not."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.limits import MAX_LEARNED, MAX_UPLOAD, exceeds, largest
from edge_sdk.lora.factors import Factors

SIZE, RANK = 64, 4


def factors(number: float) -> Factors:
    """A matrix of SIZE x SIZE, all of whose factors' numbers are one."""
    return Factors(
        np.full((SIZE, RANK), number, np.float32), np.full((RANK, SIZE), number, np.float32)
    )


@pytest.mark.parametrize("number", [1e12, 1e19, 3.3e38, -3.3e38, float("nan"), float("-inf")])
def test_no_number_is_too_large_to_be_seen(number: float) -> None:
    """Squares that float32 cannot hold, NaN and infinity exceed every limit."""
    assert exceeds(factors(number), MAX_LEARNED)
    assert not largest(factors(number)) <= 1e4


def test_the_limit_is_that_of_the_matrix() -> None:
    """The root mean square of the product counts, not the numbers of one factor."""
    at = float(np.sqrt(MAX_UPLOAD / RANK))

    assert not exceeds(factors(0.99 * at), MAX_UPLOAD)
    assert exceeds(factors(1.01 * at), MAX_UPLOAD)
    assert not exceeds(factors(1.01 * at), MAX_LEARNED)
    crossed = np.zeros((SIZE, 2), np.float32), np.zeros((2, SIZE), np.float32)
    crossed[0][:, 0], crossed[1][1] = 1e3, 1e3  # each factor is large, and their product is 0
    assert not exceeds(Factors(*crossed), MAX_UPLOAD)


def test_the_largest_of_nothing_is_nothing() -> None:
    """Empty arrays, and none at all, have no number."""
    assert largest([]) == 0.0
    assert largest([np.zeros((0, 3), np.float32)]) == 0.0
    assert largest([np.array([1.0, -7.0]), np.array([3.0])]) == 7.0
