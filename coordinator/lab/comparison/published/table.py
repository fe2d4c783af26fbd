"""A paper's own numbers beside ours: rows of the main table, and a table of all of them.

They are the paper's: nothing is ranked, tested or averaged with them. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.config.scoring import SCORES
from coordinator.lab.comparison.published.config import MEASURES, PaperSection, PublishedRow
from coordinator.lab.comparison.published.ours import OurValues
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    mean,
    words,
)
from coordinator.lab.comparison.table import NAMES

MARK = " (as published)"
# Zeros at the end, which a number in a file does not keep, are the paper's as well.
LEAST_DIGITS = {"perplexity": 2, **{name: score.digits for name, score in SCORES.items()}}


def with_published(main: ResultTable, paper: PaperSection | None) -> ResultTable:
    """Return the main table with the paper's rows, each below ours of the same method."""
    if paper is None or not paper.numbers:
        return main
    left = [row for row in _joined(paper.numbers) if _fits(row, main.columns)]
    rows: list[Sequence[Entry]] = []
    for own in main.rows:
        rows.append(own)
        for row in [row for row in left if (row.method, row.devices) == _names(own)]:
            rows.append(_main_row(row, main.columns))
            left.remove(row)
    return replace(main, rows=[*rows, *(_main_row(row, main.columns) for row in left)])


def published_table(paper: PaperSection, ours: OurValues) -> ResultTable:
    """Return every published number with ours beside it, where a run here has one."""
    columns = (
        *NAMES,
        Column("measure", "measure"),
        Column("published", "as published"),
        Column("ours", "ours"),
        Column("source", "published in"),
    )
    texts = [
        f"What {paper.title} ({paper.source}) prints, and what these runs have of it; neither "
        "ranked nor tested against each other"
    ]
    if any(MEASURES[name].has_reference for row in paper.numbers for name in row.values):
        texts.append(f"The reference is {ours.reference}")
    if paper.scale is not None:
        texts.append(warning(paper.scale))
    return ResultTable(
        name="published",
        title="As published",
        caption=". ".join(texts),
        columns=columns,
        rows=[
            _row(row, measure, value, ours)
            for row in paper.numbers
            for measure, value in row.values.items()
        ],
    )


def warning(scale: str) -> str:
    """Return what is to be said of a scale at which nothing can be compared."""
    return (
        f"Scale {scale}: these runs train another, smaller model on other data for a few steps, "
        "so that ours and the published numbers are of different things"
    )


def _row(row: PublishedRow, measure: str, value: float, ours: OurValues) -> list[Entry]:
    name = MEASURES[measure]
    # Our scores are kept as their programs count them, the others in a reader's unit or in bytes.
    found = ours.of(row.method, row.devices, measure)
    return [
        words(row.method),
        words(row.devices),
        Entry(name.title, (("", measure),)),
        _published(measure, value),
        mean(found, name.digits, name.unit) if found is not None else EMPTY,
        words(row.source),
    ]


def _published(measure: str, value: float) -> Entry:
    text, least = f"{value:,}".removesuffix(".0"), LEAST_DIGITS.get(measure, 0)
    if len(text.partition(".")[2]) < least:
        text = f"{value:,.{least}f}"
    return Entry(text, (("", value * MEASURES[measure].unit),))


# ---- in the main table ----


def _joined(rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    """Return one row for each method and set of devices, with all that is published of it."""
    joined: dict[tuple[str, str], PublishedRow] = {}
    for row in rows:
        before = joined.get((row.method, row.devices))
        values = {**before.values, **row.values} if before is not None else row.values
        joined[row.method, row.devices] = replace(row, values=values)
    return list(joined.values())


def _fits(row: PublishedRow, columns: Sequence[Column]) -> bool:
    """Return whether one of its values has a column."""
    return any(column.key in row.values for column in columns)


def _names(row: Sequence[Entry]) -> tuple[str, str]:
    return row[0].text, row[1].text


def _main_row(row: PublishedRow, columns: Sequence[Column]) -> list[Entry]:
    names = {"method": words(row.method + MARK), "devices": words(row.devices)}
    found = {key: _published(key, value) for key, value in row.values.items() if key != "trained"}
    return [{**found, **names}.get(column.key, EMPTY) for column in columns]
