"""The report of a comparison: a table, pictures, and one HTML file that needs nothing else.

`report.html` beside this file is its template. Knows no training and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.lab.comparison.cells import RunResult
from coordinator.lab.comparison.config import LOCAL, labels_for_all
from coordinator.lab.comparison.cost_tables import (
    Target,
    budget_table,
    find_target,
    target_table,
    traffic_table,
)
from coordinator.lab.comparison.plots import Picture, draw
from coordinator.lab.comparison.result_table import ResultTable, markdown
from coordinator.lab.comparison.robustness import robustness_table
from coordinator.lab.comparison.table import main_table, make_rows
from coordinator.report.template import render
from edge_sdk.config.describe import dump_config
from edge_sdk.files import storage_errors

if TYPE_CHECKING:
    from coordinator.lab.comparison.config import CompareConfig

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a report says."""

    title: str
    """What was compared."""
    facts: Sequence[str]
    """How it was compared, a sentence each."""
    column_titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The table; its first two columns name the row."""
    notes: Sequence[str]
    """What to know about single rows."""
    pictures: Sequence[Picture]
    config: str
    """The configuration, as text."""
    tables: Sequence[ResultTable] = ()
    """Further tables."""

    def html(self) -> str:
        """Return the page with its style and its pictures inside."""
        return render(TEMPLATE, self)

    def write(self, out: Path) -> str:
        """Write report.html, table.md and the pictures to *out*; return the table.

        Raises:
            StorageError: they cannot be written.
        """
        table = markdown(self.column_titles, self.rows)
        with storage_errors(out):
            for picture in self.pictures:
                picture.write(out)
            (out / "table.md").write_text(table + "\n", encoding="utf-8")
            for each in self.tables:
                each.write(out)
            (out / "report.html").write_text(self.html(), encoding="utf-8")
        return table


def write_report(config: CompareConfig, cells: Sequence[RunResult], out: Path) -> list[ResultTable]:
    """Write report.html, tables and pictures to *out*; return the tables, the main one first."""
    wanted, is_classifier = config.compare, config.task == "sequence-classification"
    target = find_target(cells, wanted.target, wanted.target_gain)
    plain = [cell for cell in cells if not cell.disturbance]
    rows = make_rows(plain, target.loss, is_classifier=is_classifier)
    main = main_table(rows, target.loss, is_classifier=is_classifier)
    tables = [
        budget_table(plain, wanted.budgets, is_classifier=is_classifier),
        target_table(plain, target),
        traffic_table(plain),
    ]
    if robustness := robustness_table(cells, wanted, is_classifier=is_classifier):
        tables.insert(2, robustness)
    page = Page(
        title="Comparison of methods",
        facts=_facts(config, plain, target),
        column_titles=main.titles,
        rows=main.texts,
        notes=[f"{r.method}, {r.device_set}: {note}" for r in rows for note in r.notes],
        pictures=draw(plain, target.loss),
        config=dump_config(config),
        tables=tables,
    )
    page.write(out)
    with storage_errors(out):
        main.write(out)
    return [main, *tables]


LABELS = {
    "device": "Labels stay on the devices, whatever the preset says; what that costs is in the "
    "traffic. As published: compare.labels=published.",
    "server": "Labels go to the coordinator, whatever the preset says; a device that holds the "
    "whole model keeps its own. As published: compare.labels=published.",
    "published": "Labels are where each preset has them: methods differ in what they give away.",
}


def _facts(config: CompareConfig, cells: Sequence[RunResult], target: Target) -> list[str]:
    """Return how it was compared, a sentence each."""
    wanted = config.compare
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell.rate for cell in cells}))
    facts = [
        f"Model {Path(config.model).name}; seeds {', '.join(map(str, wanted.seeds))}, of which a "
        "number after \u00b1 is the sample standard deviation. Each seed deals the data out anew.",
        LABELS[labels_for_all(config)],
        f"Learning rates {rates}: every method tried all of them on seed {wanted.seeds[0]} and "
        "kept, for each set of devices, the one with the lowest final loss.",
        f"Time is modelled from operations, bytes and data sheets, to a loss of {target.loss:.4g} "
        f"({target.why}), between evaluations on a straight line. `Simulated in` is what this "
        "machine took for it, one device after the other.",
        "All methods train on the same number of samples, to the nearest whole round. Methods "
        "without devices (cenlora, ft) train on the joined data on the coordinator's machine; "
        "sending the data there is not counted.",
        "Homogeneous: all devices are like the one with the median memory. A device that cannot "
        "hold its part drops out with its data; one cut and one rank for all are what the weakest "
        "device can hold; hlora and hetlora give each device the largest rank that fits it.",
        "Peak memory and numbers trained are those of the smallest and the largest device. Memory "
        "is predicted from the plan: all simulated devices share one process, whose measured peak "
        "is nobody's. Energy is modelled: a board's highest power for the time in which it "
        "computes.",
    ]
    kinds = {cell.device_set for cell in cells if cell.method == LOCAL}
    missing = [kind for kind in wanted.device_sets if kind not in kinds]
    if LOCAL in wanted.references and missing:
        facts.append(
            f"There is no row of devices alone among the {' and '.join(missing)} ones: none of "
            "them can hold the whole model."
        )
    if kinds:
        facts.append(
            "local: each device that can hold the whole model trains alone on its own data, as "
            "many steps as with the others, and sends nothing; loss and score are means over these "
            "devices, time is that of the slowest."
        )
    return facts
