"""Positions travel as runs, and come back as what they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.positions import MAX_RUN_NUMBERS, from_runs, to_runs

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)


@given(hnp.arrays(np.bool_, SHAPES))
def test_positions_come_back(mask_BT: np.ndarray) -> None:
    """Any positions of any micro-batch are those that were sent; none at all say nothing."""
    runs = to_runs(mask_BT)

    assert bool(runs) == mask_BT.any()
    if runs:
        assert np.array_equal(from_runs(runs, *mask_BT.shape), mask_BT)


def test_completions_are_one_run_each() -> None:
    """Two completions take four numbers, however long they are."""
    mask_BT = np.zeros((2, 1000), dtype=np.bool_)
    mask_BT[0, 400:700] = mask_BT[1, 100:999] = True

    assert to_runs(mask_BT) == (400, 700, 1100, 1999)


def test_more_runs_than_a_header_holds_are_not_sent() -> None:
    """Every other position of many rows: then all of them are wanted."""
    mask_BT = np.zeros((4, 2 * MAX_RUN_NUMBERS), dtype=np.bool_)
    mask_BT[:, ::2] = True

    assert to_runs(mask_BT) == ()


@pytest.mark.parametrize(
    "runs",
    [
        (1,),
        (0, 3, 5),
        (3, 2),
        (2, 2),
        (-1, 3),
        (0, 11),
        (4, 6, 5, 7),
        (0, 2**63 - 1),
        (-(2**63), 1),
    ],
)
def test_what_is_no_run_is_refused(runs: tuple[int, ...]) -> None:
    """An odd count, a run that ends before it begins, overlaps, or is beyond the last position."""
    with pytest.raises(RemoteProtocolError, match="wanted: no ascending runs of 2 x 5 positions"):
        from_runs(runs, 2, 5)


@given(st.lists(st.integers(-3, 14), min_size=1, max_size=6))
def test_runs_of_a_stranger_are_understood_or_refused(runs: list[int]) -> None:
    """Whatever numbers come, they are the runs of the mask that is made of them, or an error."""
    try:
        mask_BT = from_runs(runs, 2, 6)
    except RemoteProtocolError:
        return

    starts, stops = runs[::2], runs[1::2]
    wanted = {i for a, b in zip(starts, stops, strict=True) for i in range(a, b)}
    assert set(np.flatnonzero(mask_BT.ravel())) == wanted
