"""Quality under a budget and cost to a target, against sums that are done here again."""

from __future__ import annotations

import csv
import io

import pytest

from coordinator.lab.comparison.config import BudgetConfig
from coordinator.lab.comparison.cost_tables import (
    budget_table,
    find_target,
    target_table,
    traffic_table,
)
from coordinator.lab.comparison.result_table import ResultTable
from tests.coordinator.lab.comparison.made_cells import make_cell


def rows_of(table: ResultTable) -> list[dict[str, str]]:
    """The rows of the CSV file."""
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_the_target_is_a_share_of_the_centralised_gain() -> None:
    """Of the best that cenlora reached; a loss of one's own wins; without cenlora, what all did."""
    central = make_cell([4.0, 1.5, 2.0], method="cenlora", is_central=True)
    cells = [make_cell([4.0, 3.0]), central]

    assert find_target(cells, None, 0.8).loss == pytest.approx(4.0 - 0.8 * 2.5)
    assert "80% of what cenlora gains, from 4 to 1.5" in find_target(cells, None, 0.8).why
    assert find_target(cells, 1.25, 0.8).loss == 1.25
    assert find_target(cells[:1], None, 0.8).loss == 3.0
    worse = make_cell([4.0, 5.0], method="cenlora")
    assert find_target([worse, cells[0]], None, 0.8).loss == 4.0


def test_costs_to_a_target_are_those_of_the_line_between_evaluations() -> None:
    """Means over the seeds that reached it, which are counted; a dash where there is no device."""
    cells = [
        make_cell([4.0, 2.0, 1.0]),
        make_cell([4.0, 3.0, 2.0], seed=1),
        make_cell([4.0, 3.5], seed=2),
        make_cell([4.0, 3.9], method="poor"),
        make_cell([4.0, 2.0], method="cenlora", is_central=True),
    ]

    mine, poor, central = rows_of(target_table(cells, find_target(cells, 3.0, 0.9)))

    assert [float(mine[name]) for name in ("samples", "time_s", "bytes", "energy_j")] == [
        pytest.approx((each * 0.5 + each * 1.0) / 2) for each in (10, 2, 800, 4)
    ]
    assert (mine["reached"], mine["reached_of"]) == ("2", "3")
    assert (poor["time_s"], poor["reached"]) == ("", "0")
    assert (central["bytes"], central["energy_j"], central["time_s"]) == ("", "", "1.0")


def test_a_budget_is_never_overspent() -> None:
    """The last evaluation that it pays for; by default, what the cheapest method spends in all."""
    cells = [
        make_cell([4.0, 3.0, 2.0]),
        make_cell([4.0, 3.5, 3.2, 3.0], method="longer"),
        make_cell([4.0, 3.9, 3.8], method="local", peak_bytes={"a": 1.0}),
        make_cell([4.0, 1.0], method="cenlora", is_central=True),
    ]

    wanted = BudgetConfig(seconds=3.0)
    mine, longer, _, central = rows_of(budget_table(cells, wanted, is_classifier=False))

    assert (mine["loss_at_bytes"], longer["loss_at_bytes"]) == ("2.0", "3.2")
    assert (mine["loss_at_seconds"], longer["loss_at_seconds"]) == ("3.0", "3.5")
    assert (central["loss_at_bytes"], central["loss_at_seconds"]) == ("", "1.0")
    with pytest.raises(ValueError, match="joules must be above 0"):
        BudgetConfig(joules=0)


def test_traffic_is_told_apart() -> None:
    """Each kind, and the sum; a kind that a method never sent is 0."""
    sent = {"up": {"activations": 30, "adapters": 10}, "down": {"round starts": 7}}

    cells = [make_cell([4.0, 3.0], traffic=sent), make_cell([4.0, 3.0], method="unknown")]

    (row,) = rows_of(traffic_table(cells))

    names = ("up_activations_bytes", "up_gradients_bytes", "up_bytes", "down_round_starts_bytes")
    assert [float(row[name]) for name in names] == [30, 0, 40, 7]
    assert float(row["down_bytes"]) == 7
