"""Faults with begin and end, and everything else, in seconds of the run's own clock."""

from __future__ import annotations

from typing import Any

from coordinator.lab.experiment.config import FaultConfig
from coordinator.lab.experiment.outcome.happening_tables import fault_table, happening_table
from tests.coordinator.lab.experiment.outcome.made_runs import made_board, made_run

FAULTS = (
    FaultConfig(board="a", do="cut", at_s=1.0, seconds=3.0),
    FaultConfig(board="a", do="kill", at_step=4),
    FaultConfig(board="b", do="throttle", at_step=5, factor=0.5, seconds=4.0),
    FaultConfig(board="b", do="link", at_step=99, to="4g-slow"),
    FaultConfig(board="b", do="power-cut", at_step=6),
)


def happened(run_s: float | None, who: str, text: str, **more: Any) -> dict[str, Any]:
    """A row of what happened."""
    return {"run_s": run_s, "who": who, "text": text, **more}


def test_a_fault_has_begin_and_end() -> None:
    """A cut ends by itself, a killed program when it is started again; some never do."""
    rows = (
        happened(-2.0, "a", "cut begins", fault=0, begins=True),
        happened(5.0, "a", "kill begins", fault=1, begins=True),
        happened(5.1, "a", "ended by SIGKILL"),
        happened(6.0, "b", "started again"),
        happened(6.5, "a", "started again"),
        happened(11.0, "b", "throttle begins", fault=2, begins=True),
        happened(15.0, "b", "throttle ends", fault=2, begins=False),
        happened(19.0, "b", "power-cut begins", fault=4, begins=True),
        happened(21.0, "b", "ended"),
    )
    run = made_run(made_board(), happenings=rows)

    table = fault_table([run], FAULTS)
    others = happening_table([run])

    assert table is not None
    assert [row[2:] for row in table.texts] == [
        ["cut", "1 s after the start", "before the first", "-2.0", "1.0", "3.0"],
        ["kill", "step 4", "1", "5.0", "6.5", "1.5"],
        ["throttle to 0.5 of its speed", "step 5", "2", "11.0", "15.0", "4.0"],
        ["link becomes 4g-slow", "step 99", "\u2013", "did not happen", "\u2013", "\u2013"],
        ["power-cut", "step 6", "2", "19.0", "\u2013", "\u2013"],
    ]
    assert others is not None
    assert [row[1:] for row in others.texts] == [
        ["a", "5.1", "ended by SIGKILL"],
        ["b", "6.0", "started again"],
        ["a", "6.5", "started again"],
    ]


def test_no_table_without_anything_in_it() -> None:
    """A run in which nothing happened, and one whose clock never began."""
    assert fault_table([made_run(made_board())], ()) is None
    assert happening_table([made_run(made_board())]) is None
    row = happened(None, "a", "kill begins", fault=0, begins=True)
    run = made_run(made_board(), happenings=(row, happened(None, "a", "out of reach")), ends_s=())
    table = fault_table([run], FAULTS[1:2])
    assert table is not None
    assert table.texts[0][5] == "did not happen"
    assert happening_table([run]) is not None
