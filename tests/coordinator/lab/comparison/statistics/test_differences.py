"""Paired differences: those of scipy on the same pairs, whatever else is among the cells."""

from __future__ import annotations

import csv
import io
import math

import pytest
from scipy import stats

from coordinator.lab.comparison.statistics.differences import (
    against_reference,
    between_sets,
    heterogeneity_table,
    mixed_cuts_table,
    reference_table,
)
from coordinator.lab.comparison.statistics.measures import measures
from coordinator.lab.comparison.statistics.picture import draw_differences
from tests.coordinator.lab.comparison.made_cells import make_cell

OURS, THEIRS = [1.1, 1.3, 1.0, 1.25], [1.0, 1.1, 0.95, 1.2]
TEXT, LABELS = measures(is_classifier=False), measures(is_classifier=True)


def runs(losses: list[float], **facts: object) -> list:  # type: ignore[type-arg]
    """A run for each loss, of seed 0, 1, ..."""
    return [make_cell([3.0, loss], seed=seed, **facts) for seed, loss in enumerate(losses)]


def test_methods_are_compared_pair_by_pair() -> None:
    """Only seeds that both have count, and only the rate that a method keeps."""
    cells = [
        *runs(THEIRS, method="ref"),
        *runs([*OURS, 9.0]),
        make_cell([3.0, 2.0], rate=0.2),
        make_cell([3.0, 0.1], disturbance="dropouts"),
    ]

    (found,) = against_reference(cells, "ref", TEXT)

    paired = stats.ttest_rel(OURS, THEIRS)
    interval = paired.confidence_interval(0.95)
    loss, perplexity = found.by_measure
    assert (found.method, loss.num_seeds) == ("m", 4)
    assert (loss.low, loss.high) == pytest.approx(tuple(interval))
    assert loss.p == 2 / 2**4  # all have one sign
    ratios = [math.exp(a - b) - 1 for a, b in zip(OURS, THEIRS, strict=True)]
    assert perplexity.mean == pytest.approx(sum(ratios) / 4)
    assert against_reference(cells, "nobody", TEXT) == []


def test_what_unequal_devices_cost_is_paired_too() -> None:
    """By method; runs without devices have no such cost."""
    cells = [
        *runs(OURS),
        *runs(THEIRS, device_set="homogeneous"),
        *runs(THEIRS, method="c", is_central=True),
        *runs(THEIRS, method="c", is_central=True, device_set="homogeneous"),
    ]

    (found,) = between_sets(cells, "heterogeneous", "homogeneous", LABELS)

    assert found.method == "m"
    assert found.by_measure[0].mean == pytest.approx(0.1)
    assert found.by_measure[1][:3] == (0.0, 0.0, 0.0)  # all cells have one accuracy
    assert between_sets(cells, "heterogeneous", "one-cut", TEXT) == []


def test_tables_hold_intervals_for_readers_and_programs() -> None:
    """Signs, brackets and p; numbers whole, shares as shares."""
    cells = [*runs(OURS), *runs(THEIRS, method="ref")]
    found = against_reference(cells, "ref", TEXT)

    table = reference_table(found, "ref", TEXT)

    assert table.titles[3:] == ["\u0394 loss", "p", "\u0394 perplexity (%)", "p"]
    (texts,) = table.texts
    assert texts[:5] == ["m", "heterogeneous", "4", "+0.1000 [-0.0125, +0.2125]", "0.12"]
    (row,) = csv.DictReader(io.StringIO(table.csv()))
    assert float(row["loss_difference_low"]) == found[0].by_measure[0].low
    assert float(row["perplexity_difference"]) == found[0].by_measure[1].mean
    assert row["loss_p"] == "0.125"
    assert "+0.1000 [-0.0125, +0.2125]" in table.latex()
    assert heterogeneity_table(found, TEXT).texts == mixed_cuts_table(found, TEXT).texts == [texts]


def test_one_seed_has_no_interval() -> None:
    """There is a difference, and nothing is known of it."""
    found = against_reference([*runs([1.5]), *runs([1.0], method="ref")], "ref", LABELS)

    (texts,) = reference_table(found, "ref", LABELS).texts

    assert texts[2:5] == ["1", "+0.5000", "\u2013"]
    assert "+0.00" in texts


def test_differences_have_a_picture() -> None:
    """A row of panels for each table that has rows; none where there is none."""
    found = against_reference([*runs(OURS), *runs(THEIRS, method="ref")], "ref", TEXT)
    alone = against_reference([*runs([1.5]), *runs([1.0], method="ref")], "ref", TEXT)

    picture = draw_differences({"a": found, "b": [], "c": alone}, TEXT)

    assert picture is not None
    assert picture.png.startswith(b"\x89PNG")
    assert draw_differences({"a": []}, TEXT) is None
