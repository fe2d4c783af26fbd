"""What is beyond all measure is found, whoever brought it; what honest devices bring is not."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.limits import MAX_LEARNED, MAX_UPLOAD, exceeds, largest, oversized
from coordinator.aggregation.rules import SERVER
from edge_sdk.errors import NumericError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors

SIZE, RANK = 64, 4


def factors(number: float) -> Factors:
    """A matrix of SIZE x SIZE, all of whose factors' numbers are one."""
    return Factors(
        np.full((SIZE, RANK), number, np.float32), np.full((RANK, SIZE), number, np.float32)
    )


def report(number: float, head: float = 0.0) -> Report:
    """What a device brings, with one number throughout."""
    b_OR, a_RI = factors(number)
    return Report(2, 8, {"w": Pair(a_RI, b_OR)}, {"score": np.full(3, head, np.float32)})


@pytest.mark.parametrize(
    "number", [10.0, 1e3, 1e12, 1e19, 3.3e38, -3.3e38, float("nan"), float("-inf")]
)
def test_the_one_is_found(number: float) -> None:
    """Only the device whose numbers they are is named; the coordinator's own do not count."""
    reports = {"a": report(0.1), "b": report(number), "c": report(0.5), SERVER: report(number)}

    found = oversized(reports)

    assert list(found) == ["b"]
    assert "beyond all measure" in found["b"]


def test_alone_it_is_to_blame() -> None:
    """Nobody else could have been the reason."""
    assert list(oversized({"a": report(1e12)})) == ["a"]
    assert list(oversized({"a": report(0.1, head=1e12), "b": report(0.1)})) == ["a"]


def test_where_all_are_nobody_is_to_blame() -> None:
    """A learning rate that is too high shows in every upload."""
    with pytest.raises(NumericError, match=r"diverged.*lower training\.learning_rate"):
        oversized({"a": report(50.0), "b": report(60.0)})


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
