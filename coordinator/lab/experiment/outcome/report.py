"""The report of an experiment: one table, pictures and facts, as Markdown and as a page.

All of it was measured, or is called estimated. `result.py` reads the runs back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from coordinator.lab.comparison.cells import RunResult, common_target, score
from coordinator.lab.comparison.plots import COSTS, Cost, Picture, draw_losses, draw_plans
from coordinator.lab.comparison.report import Page
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    number,
    words,
)
from coordinator.lab.experiment.completed_runs import FACTS, NOT_RUN
from coordinator.lab.experiment.config import ExperimentConfig
from coordinator.lab.experiment.outcome.happening_tables import fault_table, happening_table
from coordinator.lab.experiment.outcome.power_table import (
    board_powers,
    power_table,
    recommendations,
)
from coordinator.lab.experiment.outcome.result import (
    BoardResult,
    ExperimentRunResult,
    kind_of,
    read_run,
)
from coordinator.lab.experiment.planned_runs import planned_runs
from edge_sdk.config.describe import dump_config
from edge_sdk.files import storage_errors

MIB, MB = 2**20, 1e6


def write_report(
    config: ExperimentConfig,
    methods: Mapping[str, ExperimentConfig],
    out: Path,
    ended: Mapping[str, str],
) -> list[ResultTable]:
    """Write report.html, tables, pictures and results.json to *out*; return the tables.

    Args:
        config: The experiment.
        methods: The config of each method.
        out: Where the runs are.
        ended: How each run ended, by folder.
    """
    runs = [
        read_run(out / run.label, run.config, run.row)
        for run in planned_runs(methods, out)
        if ended.get(run.label, NOT_RUN) != NOT_RUN and (out / run.label / FACTS).is_file()
    ]
    if not runs:
        return []
    is_classifier = config.task == "sequence-classification"
    cells = [run.cell for run in runs if run.cell is not None]
    target = config.experiment.target
    if target is None and cells:
        target = common_target(cells)
    with storage_errors(out):
        results = [asdict(run) | {"shares": run.shares()} for run in runs]
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    main = run_table(runs, target, is_classifier=is_classifier)
    powers = board_powers(runs)
    found = (fault_table(runs, config.faults), happening_table(runs), power_table(powers))
    tables = [table for table in found if table is not None]
    page = Page(
        title=f"Experiment on {kind_of(config)} boards",
        facts=[*_facts(config, runs), *recommendations(powers)],
        column_titles=main.titles,
        rows=main.texts,
        notes=_notes(runs),
        pictures=_pictures(cells, target),
        config=dump_config(config),
        tables=tables,
    )
    page.write(out)
    with storage_errors(out):
        main.write(out)
    return [main, *tables]


# ---- the table ----


def run_table(
    runs: Sequence[ExperimentRunResult], target: float | None, *, is_classifier: bool
) -> ResultTable:
    """Return a row for each run and, below it, one for each of its boards."""
    to_target = "" if target is None else f" to loss {target:.4g}"
    score_column = ("accuracy", "accuracy (%)") if is_classifier else ("perplexity", "perplexity")
    columns = (
        Column("run", "run"),
        Column("board", "board"),
        Column("loss_before", "loss before training"),
        Column("loss", "loss"),
        Column(*score_column),
        Column("time_to_target_s", f"clock{to_target} (s)"),
        Column("energy_to_target_j", f"energy{to_target} (J)"),
        Column("time_s", "clock (s)"),
        Column("energy_j", "energy (J)"),
        Column("rounds", "rounds"),
        Column("blocks", "blocks"),
        Column("compute_share", "computes (%)"),
        Column("link_share", "link busy (%)"),
        Column("bytes_up", "up (MB)"),
        Column("bytes_down", "down (MB)"),
        Column("peak_bytes", "peak memory (MiB)"),
        Column("starts", "starts"),
    )
    rows = []
    for run in runs:
        rows.append(_whole_row(run, target, is_classifier=is_classifier))
        rows += [_board_row(run, board) for board in run.boards]
    caption = "Seconds of a real clock, from the first round to the last evaluation"
    return ResultTable(name="table", title="Results", caption=caption, columns=columns, rows=rows)


def _whole_row(
    run: ExperimentRunResult, target: float | None, *, is_classifier: bool
) -> list[Entry]:
    energies = [board.energy_j for board in run.boards if board.energy_j is not None]
    is_estimated = any(board.energy_is_estimated for board in run.boards)
    energy_j = sum(energies) if len(energies) == len(run.boards) else None
    return [
        words(run.label),
        words("all"),
        *_learned(run.cell, target, is_classifier=is_classifier, is_estimated=is_estimated),
        number(run.seconds, 1),
        _energy(energy_j, is_estimated=is_estimated),
        number(len(run.ends_s), 0),
        EMPTY,
        EMPTY,
        EMPTY,
        number(sum(board.bytes_up for board in run.boards), 2, MB),
        number(sum(board.bytes_down for board in run.boards), 2, MB),
        EMPTY,
        number(sum(board.starts for board in run.boards), 0),
    ]


def _learned(
    cell: RunResult | None, target: float | None, *, is_classifier: bool, is_estimated: bool
) -> list[Entry]:
    """Return losses, score, and what the target cost."""
    if cell is None or target is None:
        return [EMPTY] * 5
    learned = [
        number(cell.points[0].loss, 4),
        number(cell.last.loss, 4),
        number(score(cell.last, is_classifier=is_classifier), 3),
    ]
    reached = cell.reached(target)
    if reached is None:
        return [*learned, Entry("not reached"), Entry("not reached")]
    energy_j = reached.energy_j if math.isfinite(reached.energy_j) else None
    return [*learned, number(reached.real_s, 1), _energy(energy_j, is_estimated=is_estimated)]


def _board_row(run: ExperimentRunResult, board: BoardResult) -> list[Entry]:
    seconds = run.seconds or float("inf")
    return [
        words(run.label),
        words(board.name),
        *[EMPTY] * 6,
        _energy(board.energy_j, is_estimated=board.energy_is_estimated),
        number(board.rounds, 0),
        words(", ".join(map(str, board.splits))) if board.rounds and board.splits else EMPTY,
        number(board.compute_s / seconds, 1, 0.01),
        number(None if board.link_s is None else board.link_s / seconds, 1, 0.01),
        number(board.bytes_up, 2, MB),
        number(board.bytes_down, 2, MB),
        number(board.peak_bytes or None, 1, MIB),
        number(board.starts, 0),
    ]


def _energy(joules: float | None, *, is_estimated: bool) -> Entry:
    entry = number(joules, 0)
    return entry._replace(text=f"{entry.text} (estimated)") if is_estimated and joules else entry


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
        "Peak memory is the most that was resident in a board's program. Bytes down include blocks "
        "of the model that a board did not hold before the run: the first run has more of them.",
    ]
    if any(board.emulated for board in config.boards.values()):
        facts.append(
            "Emulated boards are processes on one machine with limits of memory, CPU time and "
            "link. Their energy is estimated: the power of the data sheet, or its share in a "
            "power mode, for the time in which it computed."
        )
    if config.devices_per_round is not None:
        facts.append(
            f"A round is one of {config.devices_per_round} boards; the others wait, and compute "
            "nothing in it. `Rounds` are those in which a board has trained."
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
    return notes
