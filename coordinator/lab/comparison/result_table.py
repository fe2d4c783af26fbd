"""A table of results and how it is written: Markdown and LaTeX for people, CSV for programs.

A cell is a text and the numbers behind it: the text is rounded and has units that suit a reader, a
number in the CSV file is whole and in bytes, seconds, joules. Pure; knows no runs.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coordinator.lab.comparison.cells import Spread

NOTHING = "\u2013"
# What LaTeX reads as something else; the backslash comes first.
_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u00b1": r"$\pm$",
    NOTHING: "--",
    "\u0394": r"$\Delta$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}

MOST_DIGITS = 9

Raw = str | int | float | None


class Entry(NamedTuple):
    """One entry of a table."""

    text: str
    """For a reader."""
    raw: tuple[tuple[str, Raw], ...] = ()
    """For a program: ends of column names, and what stands there."""


class Column(NamedTuple):
    """What a column holds."""

    key: str
    """Name in CSV files, with the unit of the numbers."""
    title: str
    """Title for a reader, with the unit of the texts."""


EMPTY = Entry(NOTHING)


def words(text: str) -> Entry:
    """Return a text as a cell."""
    return Entry(text, (("", text),))


def number(value: float | None, digits: int, unit: float = 1.0) -> Entry:
    """Return a number as a cell; *unit* is what the reader's unit is worth."""
    if value is None:
        return EMPTY
    scaled = value / unit
    return Entry(f"{scaled:,.{digits_of(scaled, digits)}f}", (("", value),))


def digits_of(value: float, digits: int) -> int:
    """Return *digits* behind the point, or enough for two that are not 0 where those hide all."""
    if not 0 < abs(value) < 10.0**-digits:
        return digits
    return min(MOST_DIGITS, 1 - math.floor(math.log10(abs(value))))


def change(value: float | None, digits: int, unit: float = 1.0) -> Entry:
    """Return a difference as a cell, with its sign."""
    if value is None:
        return EMPTY
    return Entry(f"{value / unit:+,.{digits}f}", (("", value),))


def mean(values: Spread | None, digits: int, unit: float = 1.0, note: str = "") -> Entry:
    """Return mean and deviation over seeds as a cell, with a note for the reader."""
    if values is None:
        return Entry(note or NOTHING)
    scaled = Spread(values.mean / unit, values.deviation / unit, values.num_seeds)
    text = scaled.text(digits_of(scaled.mean, digits)) + (f" ({note})" if note else "")
    deviation = values.deviation if values.num_seeds > 1 else None
    return Entry(text, (("", values.mean), ("_sd", deviation)))


def span(values: tuple[float, float] | None, digits: int, unit: float = 1.0) -> Entry:
    """Return the smallest and the largest value as a cell."""
    if values is None:
        return EMPTY
    texts = [f"{value / unit:,.{digits}f}" for value in values]
    text = texts[0] if texts[0] == texts[1] else NOTHING.join(texts)
    return Entry(text, (("_min", values[0]), ("_max", values[1])))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTable:
    """A table with a name, which its files have, too."""

    name: str
    title: str
    caption: str
    """What it says and how that is defined, in whole sentences."""
    columns: Sequence[Column]
    """The first two name the row."""
    rows: Sequence[Sequence[Entry]]

    @property
    def titles(self) -> list[str]:
        """The titles of the columns, for a reader."""
        return [column.title for column in self.columns]

    @property
    def texts(self) -> list[list[str]]:
        """The rows, for a reader."""
        return [[cell.text for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        return markdown(self.titles, self.texts)

    def csv(self) -> str:
        """Return the numbers as comma-separated values; what is unknown is empty."""
        ends = [self._ends(index) for index in range(len(self.columns))]
        names = [
            f"{column.key}{end}"
            for column, own in zip(self.columns, ends, strict=True)
            for end in own
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            found = [dict(cell.raw) for cell in row]
            writer.writerow(
                [raw.get(end) for raw, own in zip(found, ends, strict=True) for end in own]
            )
        return text.getvalue()

    def _ends(self, index: int) -> list[str]:
        """Return the ends of names that a column needs, in the order in which they come."""
        found = dict.fromkeys(end for row in self.rows for end, _ in row[index].raw)
        return list(found) or [""]

    def latex(self) -> str:
        """Return a table for LaTeX with the package booktabs."""
        sides = "ll" + "r" * (len(self.columns) - 2)
        lines = [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(self.title)}. {latex(self.caption)}}}",
            rf"\label{{tab:{self.name}}}",
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
            _latex_row(self.titles),
            r"\midrule",
            *(_latex_row(texts) for texts in self.texts),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write the table to *folder* in three files of its name: Markdown, CSV and LaTeX."""
        kinds = {"md": self.markdown() + "\n", "csv": self.csv(), "tex": self.latex()}
        for kind, text in kinds.items():
            (folder / f"{self.name}.{kind}").write_text(text, encoding="utf-8")


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def latex(text: str) -> str:
    """Return *text* as LaTeX sets it letter by letter."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(latex(text) for text in texts) + r" \\"
