"""Both sides know by the same orders when the states of frozen blocks hold no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import RoundStart, Stamp
from edge_sdk.protocol.replay import Unchanged, check_rows, joined, sent_rows


def start(step: int, **settings: Any) -> RoundStart:
    """An order to begin a round."""
    settings = {"end_step": step + 5, "is_full": False, **settings}
    return RoundStart(stamp=Stamp(step=step), **settings)


CHANGE = ("model.layers.0.mlp.up_proj.U", "model.layers.0.mlp.up_proj.V")


@pytest.mark.parametrize(
    ("orders", "holds"),
    [
        ([(start(0, is_full=True), ())], [False]),
        ([(start(0, is_full=True), ()), (start(5), ()), (start(10), ())], [False, True, True]),
        ([(start(0, is_full=True), ()), (start(5), CHANGE), (start(10), ())], [False, False, True]),
        ([(start(0, is_full=True), ()), (start(5), ("score.weight",))], [False, True]),
        ([(start(0, is_full=True), ()), (start(5), ()), (start(5, is_full=True), ())], [0, 1, 0]),
        ([(start(5, restore_step=5), ()), (start(10), ())], [False, True]),
        ([(start(0, is_full=True), ()), (start(5), ()), (start(5, restore_step=5), ())], [0, 1, 1]),
        ([(start(0, is_full=True), ()), (start(5), CHANGE), (start(0, restore_step=0), ())],
         [False, False, False]),
    ],
)  # fmt: skip
def test_what_was_computed_holds_until_the_blocks_change(
    orders: list[tuple[RoundStart, tuple[str, ...]]], holds: list[bool]
) -> None:
    """Everything full, any change, and a step back beyond the last change end it."""
    unchanged = Unchanged()

    assert [unchanged.begin(*order) for order in orders] == holds


def test_whoever_begins_anew_assumes_nothing() -> None:
    """After `forget` the next order is the first one."""
    unchanged = Unchanged()
    unchanged.begin(start(0, is_full=True), ())
    unchanged.forget()

    assert not unchanged.begin(start(5), ())
    assert unchanged.begin(start(10), ())


@pytest.mark.parametrize(
    ("samples", "replays", "rows", "hidden"),
    [
        ((1, 2), (), 3, 3),
        ((1, -2), (), 2, 2),
        ((1, 2**60), (), 2, 2),
        ((1, 2), (2,), 2, 1),
        ((1, 2), (-1,), 2, 1),
        ((1, 2), (1, 0), 2, 0),
        ((1, 2), (1, 1), 2, 0),
        ((1, 2), (1,), 2, 2),
        ((1, 2), (), 2, 1),
    ],
)
def test_rows_that_do_not_add_up_are_refused(
    samples: tuple[int, ...], replays: tuple[int, ...], rows: int, hidden: int
) -> None:
    """Each sequence has a sample, and either a state or a place among the replays."""
    with pytest.raises(RemoteProtocolError):
        check_rows(samples, replays, rows, hidden)


def test_states_find_their_rows_again() -> None:
    """What is sent and what is kept give the whole micro-batch, padded with zeros."""
    draw = np.random.default_rng(0)
    states = [draw.normal(size=(length, 3)).astype(np.float32) for length in (4, 2, 1)]
    rest = sent_rows((1,), 3)

    whole = joined({1: states[1]} | {row: states[row] for row in rest}, 3, 4, 3)

    assert rest == [0, 2]
    for row, state in enumerate(states):
        np.testing.assert_array_equal(whole[row, : len(state)], state)
        assert not whole[row, len(state) :].any()
