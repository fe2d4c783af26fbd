"""A sweep as a table and as pictures: a row and a place for each value and method."""

from __future__ import annotations

import csv
import io

import pytest
from scipy import stats

from coordinator.lab.comparison.sweeps.grid import grid, read_sweep
from coordinator.lab.comparison.sweeps.picture import draw_sweep_of
from coordinator.lab.comparison.sweeps.table import SweptRuns, sweep_table
from tests.coordinator.lab.comparison.made_cells import make_cell

ALPHA, RULE = read_sweep("simulation.alpha=0.1,5"), read_sweep("aggregation=exact,svd")


def swept(*sweeps: str) -> list[SweptRuns]:
    """Two methods at every point of a grid, of which one has a settled rate."""
    found = []
    for at, point in enumerate(grid([read_sweep(text) for text in sweeps])):
        cells = [
            make_cell([3.0, 2.0 + at]),
            make_cell([3.0, 2.5 + at], seed=1),
            *(make_cell([3.0, 2.0 + abs(r - 2)], rate=float(r), method="n") for r in (1, 2, 3)),
        ]
        found.append(SweptRuns(point, cells))
    return found


def test_a_row_for_each_value_and_method() -> None:
    """At the rate that the method keeps there; intervals over seeds where there are several."""
    table = sweep_table(swept("simulation.alpha=0.1,5"), is_classifier=False)

    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [(row["method"], row["simulation.alpha"]) for row in rows] == [
        ("m", "0.1"),
        ("m", "5"),
        ("n", "0.1"),
        ("n", "5"),
    ]
    assert [row["settled"] for row in rows] == ["0", "0", "1", "1"]
    low, high = stats.ttest_1samp([3.0, 3.5], 0.0).confidence_interval(0.95)
    found = [float(rows[1][f"loss{end}"]) for end in ("", "_low", "_high")]
    assert found == pytest.approx([3.25, low, high])
    assert rows[2]["loss_low"] == ""
    assert table.titles[:3] == ["method", "devices", "alpha"]


def test_each_key_has_a_picture() -> None:
    """Numbers on an axis, words at places of their own; further keys have panels of their own."""
    runs = swept("simulation.alpha=0.1,5", "aggregation=exact,svd")

    over_alpha = draw_sweep_of(ALPHA, runs, is_classifier=False)
    over_rule = draw_sweep_of(RULE, runs, is_classifier=True)

    assert (over_alpha.name, over_rule.name) == ("sweep-alpha", "sweep-aggregation")
    texts = [dict(each.vectors)["svg"].decode() for each in (over_alpha, over_rule)]
    for panel in ("aggregation exact", "aggregation svd"):
        assert f"<!-- heterogeneous devices, {panel} -->" in texts[0]
    assert "<!-- heterogeneous devices, alpha 0.1 -->" in texts[1]
    assert "<!-- svd -->" in texts[1]
    assert "<!-- accuracy (%) -->" in texts[1]
    assert "<!-- accuracy (%) -->" not in texts[0]
    # What is drawn lies inside: losses from 2 to 5.5, an accuracy of 25 %.
    assert "<!-- 4 -->" in texts[0]
    assert "<!-- 25.0 -->" in texts[1]
