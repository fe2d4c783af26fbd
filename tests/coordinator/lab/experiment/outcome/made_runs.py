"""Runs of boards for tests of tables: made up, two rounds of 10 s."""

from __future__ import annotations

from typing import Any

from coordinator.lab.experiment.outcome.result import BoardResult, ExperimentRunResult


def made_board(**settings: Any) -> BoardResult:
    """A board that trained on 1000 tokens with 50 measured joules."""
    facts: dict[str, Any] = {
        "name": "a",
        "splits": (1,),
        "compute_s": 5.0,
        "bytes_up": 1,
        "bytes_down": 1,
        "link_s": None,
        "peak_bytes": 1,
        "peak_group_bytes": None,
        "killed_for_memory": 0,
        "energy_j": 50.0,
        "energy_is_estimated": False,
        "starts": 1,
        "tokens": 1000,
        "power_mode": None,
    }
    facts |= {"rounds": 2, "trained_s": 20.0, "trained_j": settings.get("energy_j", 50.0)}
    return BoardResult(**facts | settings)


def made_run(*boards: BoardResult, label: str = "run", **settings: Any) -> ExperimentRunResult:
    """A run of these boards."""
    facts: dict[str, Any] = {"outcome": "completed", "seconds": 20.0, "coordinator_s": 1.0}
    facts |= {"cell": None, "ends_s": (10.0, 20.0), "happenings": ()}
    return ExperimentRunResult(label=label, boards=boards, **facts | settings)
