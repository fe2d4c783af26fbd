"""The report of a comparison: a table, pictures, and one HTML file that needs nothing else.

`report.html` beside this file is its template. Knows no training and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coordinator.lab.comparison.cells import RunResult
from coordinator.lab.comparison.config import LOCAL, CompareSection, labels_for_all
from coordinator.lab.comparison.cost_tables import (
    Target,
    budget_table,
    find_target,
    target_table,
    traffic_table,
)
from coordinator.lab.comparison.plots import Picture, draw
from coordinator.lab.comparison.published.ours import OurValues
from coordinator.lab.comparison.published.table import (
    published_table,
    warning,
    with_published,
)
from coordinator.lab.comparison.rank_energy import draw_energy, energy_table
from coordinator.lab.comparison.result_table import ResultTable, markdown
from coordinator.lab.comparison.robustness import robustness_table
from coordinator.lab.comparison.search.picture import draw_search
from coordinator.lab.comparison.search.table import rate_table, unsettled
from coordinator.lab.comparison.statistics.differences import (
    against_reference,
    between_sets,
    heterogeneity_table,
    mixed_cuts_table,
    reference_table,
)
from coordinator.lab.comparison.statistics.measures import measures
from coordinator.lab.comparison.statistics.picture import draw_differences
from coordinator.lab.comparison.statistics.ranking import rank_table
from coordinator.lab.comparison.table import main_table, make_rows
from coordinator.report.template import render
from edge_sdk.config.describe import dump_config
from edge_sdk.files import storage_errors

if TYPE_CHECKING:
    from coordinator.lab.comparison.config import CompareConfig
    from coordinator.lab.comparison.published.config import PaperSection

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
    main = with_published(main, config.paper)
    found = _differences(config, plain)
    tables = [
        *_published(config, plain, target),
        *found.tables,
        rate_table(plain),
        budget_table(plain, wanted.budgets, is_classifier=is_classifier),
        target_table(plain, target),
        traffic_table(plain),
    ]
    if energy := energy_table(plain):
        tables.append(energy)
    if robustness := robustness_table(cells, wanted, is_classifier=is_classifier):
        tables.append(robustness)
    page = Page(
        title="Comparison of methods",
        facts=_facts(config, plain, target),
        column_titles=main.titles,
        rows=main.texts,
        notes=[f"{r.method}, {r.device_set}: {note}" for r in rows for note in r.notes],
        pictures=[*draw(plain, target.loss), *found.pictures],
        config=dump_config(config),
        tables=tables,
    )
    page.write(out)
    with storage_errors(out):
        main.write(out)
    return [main, *tables]


def _published(
    config: CompareConfig, cells: Sequence[RunResult], target: Target
) -> list[ResultTable]:
    """Return the paper's numbers beside ours, where this is a paper's experiment."""
    paper, wanted = config.paper, config.compare
    if paper is None or not paper.numbers:
        return []
    reference = wanted.reference or wanted.presets[0]
    return [published_table(paper, OurValues(cells, reference, target.loss))]


class _Found(NamedTuple):
    tables: list[ResultTable]
    pictures: list[Picture]


def _differences(config: CompareConfig, cells: Sequence[RunResult]) -> _Found:
    """Return who is ahead, whether that is more than chance, and further pictures."""
    wanted = config.compare
    kinds = measures(is_classifier=config.task == "sequence-classification")
    reference = wanted.reference or wanted.presets[0]
    against = against_reference(cells, reference, kinds)
    unequal = between_sets(cells, "heterogeneous", "homogeneous", kinds)
    mixed = between_sets(cells, "heterogeneous", "one-cut", kinds)
    ranking = rank_table(cells, unsettled(cells, wanted.learning_rate_search), kinds[0])
    made = [
        reference_table(against, reference, kinds) if against else None,
        heterogeneity_table(unequal, kinds) if unequal else None,
        mixed_cuts_table(mixed, kinds) if mixed else None,
    ]
    panels = {
        f"less {reference}": against,
        "unequal devices less equal ones": unequal,
        "mixed cuts less one cut": mixed,
    }
    pictures = [draw_differences(panels, kinds), draw_search(cells), draw_energy(cells)]
    return _Found(
        [table for table in (ranking, *made) if table is not None],
        [picture for picture in pictures if picture is not None],
    )


LABELS = {
    "device": "Labels stay on the devices, whatever the preset says; what that costs is in the "
    "traffic. As published: compare.labels=published.",
    "server": "Labels go to the coordinator, whatever the preset says; a device that holds the "
    "whole model keeps its own. As published: compare.labels=published.",
    "published": "Labels are where each preset has them: methods differ in what they give away.",
}


def _how_rates_were_found(wanted: CompareSection, rates: str) -> str:
    kept = (
        "For each set of devices, a method keeps the rate with the lowest final loss on the "
        f"evaluation data with seed {wanted.seeds[0]}."
    )
    search, began = wanted.learning_rate_search, len(wanted.learning_rates) or 1
    if not search.most_trials:
        return f"Learning rates {rates}: every method tried all of them. {kept}"
    return (
        f"Learning rates were searched by every method for itself: {began} to begin with, then up "
        f"to {search.most_trials} more, beyond an edge while the best one stood there, then "
        f"between the best one and its neighbours until these were at most {search.finest:g} "
        f"times away. {kept}"
    )


def _of_paper(paper: PaperSection) -> list[str]:
    """Return whose experiment this is, and what its numbers are worth here."""
    facts = [
        f"The experiment of {paper.title} ({paper.source}). Rows marked as published are that "
        "paper's own numbers: they stand beside ours, and are neither ranked nor tested."
    ]
    return [*facts, *([f"{warning(paper.scale)}."] if paper.scale is not None else [])]


def _facts(config: CompareConfig, cells: Sequence[RunResult], target: Target) -> list[str]:
    """Return how it was compared, a sentence each."""
    wanted = config.compare
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell.rate for cell in cells}))
    facts = [
        f"Model {Path(config.model).name}; seeds {', '.join(map(str, wanted.seeds))}, of which a "
        "number after \u00b1 is the sample standard deviation. Each seed deals the data out anew.",
        LABELS[labels_for_all(config)],
        _how_rates_were_found(wanted, rates),
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
    if config.paper is not None:
        facts[:0] = _of_paper(config.paper)
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
