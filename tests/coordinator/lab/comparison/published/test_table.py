"""A paper's numbers in our tables: beside ours, marked, and in nothing that is computed."""

from __future__ import annotations

import csv
import io

from coordinator.lab.comparison.published.config import PaperSection, PublishedRow
from coordinator.lab.comparison.published.ours import OurValues
from coordinator.lab.comparison.published.table import published_table, with_published
from coordinator.lab.comparison.table import main_table, make_rows
from tests.coordinator.lab.comparison.made_cells import make_cell

CELLS = [
    make_cell([3.0, 2.0, 1.0], method="splitlora", scores={"bleu": 0.68}),
    make_cell([3.0, 2.0, 1.5], method="hlora", scores={"bleu": 0.66}),
]
PAPER = PaperSection(
    title="A Paper",
    source="arXiv 0000.00000",
    numbers=(
        PublishedRow(
            method="splitlora", devices="heterogeneous", values={"bleu": 68.79}, source="Table I"
        ),
        PublishedRow(
            method="splitlora", devices="heterogeneous", values={"perplexity": 3.5}, source="Fig. 2"
        ),
        PublishedRow(
            method="hlora", devices="heterogeneous", values={"slowdown": 1.5}, source="text"
        ),
        PublishedRow(method="FT", devices="heterogeneous", values={"bleu": 70.0}, source="Table I"),
    ),
)
MAIN = main_table(make_rows(CELLS, 1.5, is_classifier=False), 1.5, is_classifier=False)


def test_published_rows_stand_below_ours_and_say_whose_they_are() -> None:
    """One for each method, with what was published of it; ours stay as they were."""
    table = with_published(MAIN, PAPER)

    assert [row[0] for row in table.texts] == [
        "splitlora",
        "splitlora (as published)",
        "hlora",
        "FT (as published)",
    ]
    assert [row for row in table.texts if not row[0].endswith(")")] == MAIN.texts
    theirs = dict(zip(table.titles, table.texts[1], strict=True))
    assert (theirs["BLEU"], theirs["perplexity"], theirs["loss"]) == ("68.79", "3.50", "\u2013")


def test_a_file_for_programs_has_one_unit_for_both() -> None:
    """BLEU is 0 to 1 in our files, whoever counted it."""
    rows = list(csv.DictReader(io.StringIO(with_published(MAIN, PAPER).csv())))

    assert [row["bleu"] for row in rows[:2]] == ["0.68", "0.6879000000000001"]


def test_without_a_paper_the_table_is_ours() -> None:
    """A comparison of one's own has no rows of others."""
    assert with_published(MAIN, None) is MAIN


def test_every_number_has_its_source_and_ours_beside_it() -> None:
    """Those without a column of the main table too; a dash where nothing of ours has it."""
    table = published_table(PAPER, OurValues(CELLS, "splitlora", 1.5))

    assert [row[:2] + row[3:] for row in table.texts] == [
        ["splitlora", "heterogeneous", "68.79", "68.00", "Table I"],
        ["splitlora", "heterogeneous", "3.50", "2.718", "Fig. 2"],
        ["hlora", "heterogeneous", "1.5", "1.33", "text"],
        ["FT", "heterogeneous", "70.00", "\u2013", "Table I"],
    ]
    assert "Scale" not in table.caption
    assert table.caption.endswith("The reference is splitlora")


def test_a_scale_warns_of_what_it_is() -> None:
    """Nobody compares a paper's model with one of two million numbers."""
    paper = PaperSection(title="A", source="B", numbers=PAPER.numbers, scale="tiny")

    caption = published_table(paper, OurValues(CELLS, "splitlora", 1.5)).caption

    assert "Scale tiny: these runs train another, smaller model on other data" in caption
