"""What is said of a search: which rate, between which, and how to settle what is not."""

from __future__ import annotations

import csv
import io
import math

from coordinator.lab.comparison.search.config import RateSearchConfig
from coordinator.lab.comparison.search.picture import draw_search
from coordinator.lab.comparison.search.table import in_sentences, rate_table, unsettled
from tests.coordinator.lab.comparison.made_cells import make_cell

INSIDE = [
    make_cell([3.0, 2.0], rate=0.1),
    make_cell([3.0, 1.5], rate=0.2),
    make_cell([3.0, math.nan], rate=0.4),
]
AT_EDGE = [
    make_cell([3.0, 2.0], rate=0.1, method="n"),
    make_cell([3.0, 1.0], rate=0.2, method="n"),
]
ALONE = [make_cell([3.0, 2.0], method="o")]


def test_a_row_shows_that_its_rate_is_the_best() -> None:
    """With the losses on both sides; a run that diverged has none."""
    table = rate_table([*INSIDE, *AT_EDGE, *ALONE, make_cell([3.0, 0.1], rate=0.9, seed=1)])

    inside, edge, alone = csv.DictReader(io.StringIO(table.csv()))
    assert (inside["learning_rate"], inside["lower_rate"], inside["higher_rate"]) == (
        "0.2",
        "0.1",
        "0.4",
    )
    assert (inside["loss"], inside["lower_loss"], inside["higher_loss"]) == ("1.5", "2.0", "")
    assert [row["settled"] for row in (inside, edge, alone)] == ["1", "0", "0"]
    assert [row[-1] for row in table.texts] == ["yes", "no: highest rate", "no: one rate"]
    assert table.texts[0][7] == "diverged"


def test_what_is_not_settled_says_how_to_settle_it() -> None:
    """The keys to change, and in which direction; nothing about what is settled."""
    found = unsettled([*INSIDE, *AT_EDGE, *ALONE], RateSearchConfig(most_trials=3))

    assert found == {
        ("n", "heterogeneous"): "learning rate 0.2 is the highest of 2 that were "
        "tried, and still the best; raise compare.learning_rate_search.most_trials above 3, or "
        "put rates above it into compare.learning_rates",
        ("o", "heterogeneous"): "0.1 is the only learning rate that was tried; "
        "raise compare.learning_rate_search.most_trials above 3",
    }


def test_the_same_is_said_of_many_once() -> None:
    """All of whom it holds stand before it: methods with the same sets of devices together."""
    rest = {("d", "all"): "high", ("e", "few"): "low"}
    found = {(m, kind): "low" for m in "abc" for kind in ("all", "few")} | rest

    assert in_sentences(found) == ["a, b, c (all, few); e (few): low", "d (all): high"]


def test_a_search_has_a_picture() -> None:
    """Where more than one rate was tried."""
    found = draw_search([*INSIDE, *AT_EDGE])

    assert found is not None
    assert found.name == "learning-rates"
    assert draw_search(ALONE) is None
