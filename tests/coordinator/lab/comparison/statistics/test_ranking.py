"""A ranking: by mean loss, and none where the first one's learning rate is not settled."""

from __future__ import annotations

import math

import pytest

from coordinator.lab.comparison.cells import RunResult
from coordinator.lab.comparison.search.config import RateSearchConfig
from coordinator.lab.comparison.search.table import unsettled
from coordinator.lab.comparison.statistics.measures import measures
from coordinator.lab.comparison.statistics.ranking import rank_table
from tests.coordinator.lab.comparison.made_cells import make_cell

(LOSS, _) = measures(is_classifier=False)


def searched(method: str, losses: dict[float, float], **facts: object) -> list[RunResult]:
    """Runs of the first seed at several rates, and one of a second seed at the best of them."""
    best = min(losses, key=lambda rate: losses[rate])
    return [
        *(make_cell([3.0, x], method=method, rate=rate, **facts) for rate, x in losses.items()),
        make_cell([3.0, losses[best] + 0.2], method=method, rate=best, seed=1, **facts),
    ]


INSIDE = {0.1: 2.0, 0.2: 1.5, 0.4: 1.8}
EDGE = {0.1: 2.0, 0.2: 1.9}


def ranked(cells: list[RunResult]) -> tuple[list[list[str]], str]:
    """Rows and caption of the ranking."""
    table = rank_table(cells, unsettled(cells, RateSearchConfig()), LOSS)
    assert table is not None
    return table.texts, table.caption


def test_methods_stand_in_the_order_of_their_loss() -> None:
    """With how far they are behind the first; a later one at an edge is marked."""
    cells = [
        *searched("late", EDGE),
        *searched("first", INSIDE),
        *searched("diverged", {0.1: math.nan}),
        *searched("local", {0.1: 0.1}),
        *searched("cenlora", {0.1: 0.1}, is_central=True),
    ]

    rows, caption = ranked(cells)

    assert [row[:3] for row in rows] == [
        ["first", "heterogeneous", "1"],
        ["late", "heterogeneous", "2"],
        ["diverged", "heterogeneous", "3"],
    ]
    assert rows[0][4:] == ["\u2013", "\u2013", "yes"]
    assert rows[1][4].startswith("+0.4000 [+0.4000, +0.4000]")
    assert [row[-1] for row in rows] == ["yes", "no", "no"]
    assert "No places" not in caption
    assert "late (heterogeneous): learning rate 0.2 is the highest" in caption


def test_a_winner_at_an_edge_is_no_winner() -> None:
    """No place and no order, and what to do; another set of devices keeps its ranking."""
    cells = [
        *searched("z", EDGE, device_set="homogeneous"),
        *searched("a", {0.1: 2.5, 0.2: 2.1, 0.4: 2.2}, device_set="homogeneous"),
        *searched("z", EDGE),
        *searched("a", INSIDE),
    ]

    rows, caption = ranked(cells)

    assert [row[:3] for row in rows] == [
        ["a", "homogeneous", "\u2013"],
        ["z", "homogeneous", "\u2013"],
        ["a", "heterogeneous", "1"],
        ["z", "heterogeneous", "2"],
    ]
    assert "No places for the homogeneous devices: the best of them stands at an edge" in caption
    assert "raise compare.learning_rate_search.most_trials above 8" in caption


@pytest.mark.parametrize("others", [[], searched("cenlora", INSIDE, is_central=True)])
def test_one_method_is_not_ranked(others: list[RunResult]) -> None:
    """There is nothing to be ahead of."""
    assert rank_table([*searched("a", INSIDE), *others], {}, LOSS) is None
