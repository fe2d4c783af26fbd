"""The report of a sweep: a table of all points, and a picture for each key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coordinator.lab.comparison.cells import RunResult, at_chosen_rates
from coordinator.lab.comparison.config import CompareConfig
from coordinator.lab.comparison.rank_energy import draw_energy
from coordinator.lab.comparison.report import Page
from coordinator.lab.comparison.result_table import ResultTable
from coordinator.lab.comparison.search.table import in_sentences, unsettled
from coordinator.lab.comparison.sweeps.picture import draw_sweep_of
from coordinator.lab.comparison.sweeps.table import SweptRuns, sweep_table
from edge_sdk.config.describe import dump_config
from edge_sdk.files import storage_errors


def write_sweep_report(config: CompareConfig, swept: Sequence[SweptRuns], out: Path) -> ResultTable:
    """Write report.html, the table and the pictures to *out*; return the table.

    Args:
        config: What was compared, before any key was swept.
        swept: The runs of every point, in the order of the grid.
        out: Folder in which each point has one of its own.
    """
    is_classifier = config.task == "sequence-classification"
    keys = [key for key, _ in swept[0].point.values]
    table = sweep_table(swept, is_classifier=is_classifier)
    pictures = [draw_sweep_of(key, swept, is_classifier=is_classifier) for key in keys]
    energy = draw_energy(_named_by_point(swept))
    values = "; ".join(f"{key.key}: {', '.join(map(str, key.values))}" for key in keys)
    page = Page(
        title="Sweep",
        facts=[
            f"Swept: {values}. Every combination is a comparison of its own, with a report in its "
            f"folder beside this file, such as {swept[0].point.folder}/report.html.",
            "Learning rates were found anew for each method, set of devices and combination.",
        ],
        column_titles=table.titles,
        rows=table.texts,
        notes=[
            f"{each.point.name}: {text}"
            for each in swept
            for text in in_sentences(unsettled(each.cells, config.compare.learning_rate_search))
        ],
        pictures=[*pictures, *([energy] if energy else [])],
        config=dump_config(config),
    )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for picture in page.pictures:
            picture.write(out)
        table.write(out)
        (out / "report.html").write_text(page.html(), encoding="utf-8")
    return table


def _named_by_point(swept: Sequence[SweptRuns]) -> list[RunResult]:
    return [
        replace(cell, method=f"{cell.method}, {each.point.name}")
        for each in swept
        for cell in at_chosen_rates(each.cells)
    ]
