"""The report of an experiment: one table, pictures and facts, as Markdown and as a page.

All of it was measured, or is called estimated. `result.py` reads the runs back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from coordinator.lab.comparison.cells import RunResult, common_target, score
from coordinator.lab.comparison.plots import COSTS, Cost, Picture, draw_losses, draw_plans
from coordinator.lab.comparison.report import Page
from coordinator.lab.comparison.result_table import NOTHING
from coordinator.lab.experiment.completed_runs import FACTS, NOT_RUN
from coordinator.lab.experiment.config import ExperimentConfig
from coordinator.lab.experiment.result import BoardResult, ExperimentRunResult, kind_of, read_run
from edge_sdk.config.describe import dump_config
from edge_sdk.files import storage_errors

MIB, MB = 2**20, 1e6


def write_report(
    config: ExperimentConfig,
    methods: Mapping[str, ExperimentConfig],
    out: Path,
    ended: Mapping[str, str],
) -> str:
    """Write report.html, table.md, pictures and results.json to *out*; return the table.

    Args:
        config: The experiment.
        methods: The config of each method.
        out: Where the runs are.
        ended: How each run ended, by folder.
    """
    runs = [
        read_run(out / label, methods[_method(label, methods)], _method(label, methods))
        for label, how in ended.items()
        if how != NOT_RUN and (out / label / FACTS).is_file()
    ]
    if not runs:
        return ""
    is_classifier = config.task == "sequence-classification"
    cells = [run.cell for run in runs if run.cell is not None]
    target = config.experiment.target
    if target is None and cells:
        target = common_target(cells)
    with storage_errors(out):
        results = [asdict(run) | {"shares": run.shares()} for run in runs]
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = Page(
        title=f"Experiment on {kind_of(config)} boards",
        facts=_facts(config, runs),
        column_titles=_titles(target, is_classifier=is_classifier),
        rows=[row for run in runs for row in _rows(run, target, is_classifier=is_classifier)],
        notes=_notes(runs),
        pictures=_pictures(cells, target),
        config=dump_config(config),
    )
    return page.write(out)


def _method(label: str, methods: Mapping[str, ExperimentConfig]) -> str:
    """Return the method of a run's folder, which is called `NAME` or `NAME-SEED`."""
    return label if label in methods else label.rpartition("-")[0]


# ---- the table ----


def _titles(target: float | None, *, is_classifier: bool) -> tuple[str, ...]:
    to_target = "" if target is None else f" to loss {target:.4g}"
    return (
        "run",
        "board",
        "loss",
        "accuracy (%)" if is_classifier else "perplexity",
        f"clock{to_target} (s)",
        "clock (s)",
        "blocks",
        "computes (%)",
        "link busy (%)",
        "up (MB)",
        "down (MB)",
        "peak memory (MiB)",
        "energy (J)",
        "starts",
    )


def _rows(
    run: ExperimentRunResult, target: float | None, *, is_classifier: bool
) -> list[tuple[str, ...]]:
    """Return a row for the whole run, and one for each board."""
    energies = [board.energy_j for board in run.boards if board.energy_j is not None]
    is_estimated = any(board.energy_is_estimated for board in run.boards)
    whole = (
        run.label,
        "all",
        *_learned(run.cell, target, is_classifier=is_classifier),
        f"{run.seconds:,.1f}",
        NOTHING,
        NOTHING,
        NOTHING,
        f"{sum(board.bytes_up for board in run.boards) / MB:,.2f}",
        f"{sum(board.bytes_down for board in run.boards) / MB:,.2f}",
        NOTHING,
        _energy(sum(energies) if len(energies) == len(run.boards) else None, is_estimated),
        str(sum(board.starts for board in run.boards)),
    )
    return [whole, *(_board_row(run, board) for board in run.boards)]


def _learned(
    cell: RunResult | None, target: float | None, *, is_classifier: bool
) -> tuple[str, str, str]:
    if cell is None or target is None:
        return (NOTHING, NOTHING, NOTHING)
    reached = cell.reached(target)
    return (
        f"{cell.last.loss:.4f}",
        f"{score(cell.last, is_classifier=is_classifier):.3f}",
        "not reached" if reached is None else f"{reached.real_s:,.1f}",
    )


def _board_row(run: ExperimentRunResult, board: BoardResult) -> tuple[str, ...]:
    seconds = run.seconds or float("inf")
    return (
        run.label,
        board.name,
        NOTHING,
        NOTHING,
        NOTHING,
        NOTHING,
        ", ".join(map(str, board.splits)) or NOTHING,
        f"{100 * board.compute_s / seconds:.1f}",
        NOTHING if board.link_s is None else f"{100 * board.link_s / seconds:.1f}",
        f"{board.bytes_up / MB:,.2f}",
        f"{board.bytes_down / MB:,.2f}",
        f"{board.peak_bytes / MIB:,.1f}",
        _energy(board.energy_j, board.energy_is_estimated),
        str(board.starts),
    )


def _energy(joules: float | None, is_estimated: bool) -> str:
    if joules is None:
        return NOTHING
    return f"{joules:,.0f}" + (" (estimated)" if is_estimated else "")


# ---- the page ----


def _pictures(cells: Sequence[RunResult], target: float | None) -> list[Picture]:
    clock = Cost("loss-clock", "Loss against time", "seconds, real clock", lambda p: p.real_s)
    costs = (clock, *(cost for cost in COSTS if cost.name != "loss-time"))
    drawn = [cell for cell in cells if len(cell.points) > 1]
    losses = (
        [draw_losses(drawn, cost, target) for cost in costs] if drawn and target is not None else []
    )
    return [*losses, *draw_plans(cells)]


def _facts(config: ExperimentConfig, runs: Sequence[ExperimentRunResult]) -> list[str]:
    """Return how it was measured, a sentence each."""
    facts = [
        f"Model {Path(config.model).name}, {len(config.boards)} boards. Times are of a real clock, "
        "from the evaluation before training to the last one; joining is not in them.",
        "`Computes` is the share of this time in which a board's program ran forward, backward or "
        "its optimizer; `link busy` that of the busier way of its relay, at the rates of the link.",
        "Peak memory is the most that was resident in a board's program.",
    ]
    if any(board.emulated for board in config.boards.values()):
        facts.append(
            "Emulated boards are processes on one machine with limits of memory, CPU time and "
            "link. Their energy is estimated: the board's highest power for the time in which it "
            "computed."
        )
    for run in runs:
        if slowest := run.slowest():
            facts.append(
                f"{run.label}: {slowest[0]}, {100 * slowest[1]:.1f} % of the time: the "
                "busiest of boards, links and coordinator."
            )
    return facts


def _notes(runs: Sequence[ExperimentRunResult]) -> list[str]:
    notes = []
    for run in runs:
        if run.outcome != "completed":
            notes.append(f"{run.label} did not complete: {run.outcome}")
        for board in run.boards:
            if board.killed_for_memory:
                notes.append(
                    f"{run.label}: {board.name} was ended {board.killed_for_memory} times by its "
                    "memory limit"
                )
        notes += [
            f"{run.label}, after {row['at_s']:.1f} s: {row['who']}: {row['text']}"
            for row in run.happenings
            if row["text"] != "ended"
        ]
    return notes
