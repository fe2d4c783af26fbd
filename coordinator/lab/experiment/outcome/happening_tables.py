"""Faults with their begin and end, and what else happened to boards, on the clock of the run. Pure.

Second 0 is the beginning of the first round, as everywhere in the report; before, they are below 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    number,
    words,
)
from coordinator.lab.experiment.config import FaultConfig
from coordinator.lab.experiment.outcome.result import ExperimentRunResult

# What `run.py` says when a program is started after it has died.
STARTED_AGAIN = "started again"


def fault_table(
    runs: Sequence[ExperimentRunResult], faults: Sequence[FaultConfig]
) -> ResultTable | None:
    """Return when each fault began and ended in each run; None where none was planned."""
    rows = [_fault_row(run, number_, fault) for run in runs for number_, fault in enumerate(faults)]
    columns = (
        Column("run", "run"),
        Column("board", "board"),
        Column("fault", "fault"),
        Column("due", "due"),
        Column("round", "in round"),
        Column("began_s", "began (s)"),
        Column("ended_s", "ended (s)"),
        Column("lasted_s", "lasted (s)"),
    )
    caption = (
        "Seconds on the clock of the run, which begins with the first round; a fault is over when "
        "the link passes, the speed is back, or the program is started again. A dash: not before "
        "the end of the run"
    )
    return (
        ResultTable(name="faults", title="Faults", caption=caption, columns=columns, rows=rows)
        if rows
        else None
    )


def _fault_row(run: ExperimentRunResult, index: int, fault: FaultConfig) -> list[Entry]:
    own = [row for row in run.happenings if row.get("fault") == index]
    began_s = next((row["run_s"] for row in own if row["begins"]), None)
    ended_s = _end_s(run, fault, own, began_s)
    lasted_s = None if ended_s is None or began_s is None else ended_s - began_s
    return [
        words(run.label),
        words(fault.board),
        words(describe(fault)),
        words(_due(fault)),
        EMPTY if began_s is None else _round(run, began_s),
        Entry("did not happen") if began_s is None else number(began_s, 1),
        number(ended_s, 1),
        number(lasted_s, 1),
    ]


def _end_s(
    run: ExperimentRunResult,
    fault: FaultConfig,
    own: Sequence[Mapping[str, Any]],
    began_s: float | None,
) -> float | None:
    """Return when a fault was over, on the clock of the run; None if it never was."""
    if began_s is None:
        return None
    if fault.do == "cut":  # ends by itself
        return began_s + (fault.seconds or 0.0)
    ends = [row["run_s"] for row in own if not row["begins"]]
    if not ends and fault.do == "kill":
        ends = [
            row["run_s"]
            for row in run.happenings
            if row["who"] == fault.board
            and row["text"] == STARTED_AGAIN
            and row["run_s"] >= began_s
        ]
    return min(ends, default=None)


def describe(fault: FaultConfig) -> str:
    """Return what a fault is, for a person."""
    if fault.do == "throttle":
        return f"throttle to {fault.factor:g} of its speed"
    return f"link becomes {fault.to}" if fault.do == "link" else fault.do


def _due(fault: FaultConfig) -> str:
    return f"{fault.at_s:g} s after the start" if fault.at_step is None else f"step {fault.at_step}"


def _round(run: ExperimentRunResult, at_s: float) -> Entry:
    if at_s < 0:
        return Entry("before the first")
    return number(min(len(run.ends_s), 1 + sum(end_s <= at_s for end_s in run.ends_s)), 0)


def happening_table(runs: Sequence[ExperimentRunResult]) -> ResultTable | None:
    """Return what happened to boards beside planned faults; None where nothing did."""
    rows = [
        [words(run.label), words(row["who"]), number(row["run_s"], 1), words(row["text"])]
        for run in runs
        for row in run.happenings
        if "fault" not in row and row["text"] != "ended"
    ]
    columns = (
        Column("run", "run"),
        Column("who", "who"),
        Column("at_s", "at (s)"),
        Column("what", "what"),
    )
    caption = "Seconds on the clock of the run, below 0 before the first round"
    return (
        ResultTable(
            name="happenings",
            title="What else happened",
            caption=caption,
            columns=columns,
            rows=rows,
        )
        if rows
        else None
    )
