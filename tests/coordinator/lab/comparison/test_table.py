"""What compared runs come to: rates, targets, times, rows; each against a plain computation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.lab.comparison.cells import (
    Held,
    at_chosen_rates,
    best_rates,
    cell_from_row,
    cell_to_row,
    common_target,
    spread,
)
from coordinator.lab.comparison.table import main_table, make_rows
from tests.coordinator.lab.comparison.made_cells import make_cell


@given(st.lists(st.floats(0.1, 5.0), min_size=2, max_size=8), st.floats(0.0, 6.0))
def test_a_loss_is_reached_on_the_line_between_two_evaluations(
    losses: list[float], target: float
) -> None:
    """As on a line through all evaluations that is looked at in ten thousand places."""
    cell = make_cell(losses)
    dense = np.linspace(0, len(losses) - 1, 10_001)
    below = dense[np.interp(dense, np.arange(len(losses)), losses) <= target]

    found = cell.reached(target)

    if found is None:
        assert not len(below) or min(losses) == target
    else:
        assert found.modelled_s == pytest.approx(2.0 * below[0] if len(below) else 0, abs=2e-3) or (
            min(losses) == pytest.approx(target)
        )
        assert found.bytes_up == pytest.approx(150 * found.modelled_s)


def test_each_method_keeps_its_best_rate_on_the_first_seed() -> None:
    """For each set of devices by final loss; a run that blew up never wins."""
    cells = [
        make_cell([3.0, 1.0], rate=0.1),
        make_cell([3.0, 0.5], rate=0.2),
        make_cell([3.0, math.nan], rate=0.4),
        make_cell([3.0, 0.9], rate=0.2, seed=1),
        make_cell([3.0, 0.8], rate=0.1, device_set="homogeneous"),
        make_cell([3.0, 0.9], rate=0.2, device_set="homogeneous"),
    ]

    assert best_rates(cells) == {("m", "heterogeneous"): 0.2, ("m", "homogeneous"): 0.1}
    assert [cell.last.loss for cell in at_chosen_rates(cells)] == [0.5, 0.9, 0.8]


def test_everybody_reaches_the_common_target() -> None:
    """It is the worst of the best losses, and no lower one would do."""
    cells = [make_cell([3.0, 1.0, 1.2]), make_cell([3.0, 2.0, 0.5]), make_cell([3.0, 0.1])]

    target = common_target(cells)

    assert target == 1.0
    assert all(cell.reached(target) is not None for cell in cells)
    assert any(cell.reached(target - 1e-9) is None for cell in cells)


def test_rows_are_means_over_seeds() -> None:
    """Mean and sample deviation of the kept rate; bytes per sample; ranges over devices."""
    cells = [
        make_cell([3.0, 1.0], peak_bytes={"a": 5.0, "b": 9.0}, trained={"a": 4, "b": 2}),
        make_cell([3.0, 2.5], rate=0.2),
        make_cell([3.0, 1.5], seed=1, notes=("without c",), peak_bytes={"a": 3.0}),
    ]

    (row,) = make_rows(cells, 1.2, is_classifier=False)

    assert (row.rate, row.rate_is_extreme, row.num_reached) == (0.1, True, 1)
    assert row.loss[:2] == pytest.approx((1.25, np.std([1.0, 1.5], ddof=1)))
    assert row.score.mean == pytest.approx((math.e + math.exp(1.5)) / 2)
    assert row.modelled_s is not None
    assert row.modelled_s.mean == pytest.approx(1.8)
    assert (row.bytes_up, row.bytes_down) == (30.0, 50.0)
    assert (row.peak_bytes, row.trained, row.notes) == ((3.0, 9.0), (2, 4), ("without c",))
    (accurate,) = make_rows(cells, 0.2, is_classifier=True)
    assert (accurate.score.mean, accurate.modelled_s) == (25.0, None)


def test_a_table_says_what_is_missing() -> None:
    """A column for each title; runs that missed the target are counted; no device: a dash."""
    cells = [make_cell([3.0, 1.0], is_central=True), make_cell([3.0, 2.0], seed=1)]
    rows = make_rows(cells, 1.5, is_classifier=False)

    table = main_table(rows, 1.5, is_classifier=False)

    lines = table.markdown().splitlines()
    assert [line.count("|") for line in lines] == [len(table.titles) + 1] * 3
    assert "1.5 (1 of 2 not reached)" in lines[2]
    assert lines[2].endswith("| \u2013 | \u2013 | \u2013 | \u2013 |")
    (late,) = make_rows(cells, 0.5, is_classifier=False)
    assert "not reached" in main_table([late], 0.5, is_classifier=False).texts[0]


def test_a_cell_survives_its_file() -> None:
    """What was written to cells.jsonl is read back as it was."""
    cell = make_cell(
        [3.0, 1.0],
        held=({"a": Held(2, 4.5)},),
        importance=((1, {"w.0.q": 0.5}),),
        peak_bytes={"a": 5.0},
        trained={"a": 4},
        notes=("n",),
        traffic={"up": {"adapters": 3}},
        disturbance="dropouts",
        disturbed=("a",),
    )

    assert cell_from_row(json.loads(json.dumps(cell_to_row(cell)))) == cell


def test_one_seed_has_no_spread() -> None:
    """A deviation is only written where there are several values."""
    assert spread([1.0]).text(1) == "1.0"
    assert spread([1.0, 3.0]).text(1) == "2.0 \u00b1 1.4"
