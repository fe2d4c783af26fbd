"""Runs for tests of tables: made up, with costs that are easy to reckon with."""

from __future__ import annotations

from typing import Any

from coordinator.lab.comparison.cells import Point, RunResult


def make_cell(losses: list[float], **settings: Any) -> RunResult:
    """A run with an evaluation every 10 samples, 2 s, 300 bytes up and 500 down, 4 J."""
    points = tuple(
        Point(10 * i, 2.0 * i, 1.0 * i, 300 * i, 500 * i, loss, 0.25, 4.0 * i)
        for i, loss in enumerate(losses)
    )
    facts = {"method": "m", "device_set": "heterogeneous", "seed": 0, "rate": 0.1}
    return RunResult(points=points, **{**facts, **settings})
