"""What a table is in Markdown, CSV and LaTeX: the same cells, each read as it is meant."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from coordinator.lab.comparison.cells import Spread
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    ResultTable,
    change,
    latex,
    mean,
    number,
    span,
    words,
)

TABLE = ResultTable(
    name="costs",
    title="Costs & gains",
    caption="All of it",
    columns=[
        Column("method", "method"),
        Column("devices", "devices"),
        Column("bytes", "traffic (MB)"),
        Column("loss", "loss"),
        Column("peak_bytes", "peak (MiB)"),
        Column("change", "\u0394 (%)"),
    ],
    rows=[
        [
            words("a_b"),
            words("few"),
            number(2.5e6, 1, 1e6),
            mean(Spread(1.25, 0.5, 2), 2),
            span((2.0**20, 2.0**21), 1, 2**20),
            change(-0.125, 1, 0.01),
        ],
        [words("c"), words("few"), EMPTY, mean(None, 2, note="not reached"), EMPTY, EMPTY],
    ],
)


def test_a_reader_gets_rounded_texts() -> None:
    """With units of the title; a dash where there is nothing."""
    assert TABLE.texts == [
        ["a_b", "few", "2.5", "1.25 \u00b1 0.50", "1.0\u20132.0", "-12.5"],
        ["c", "few", "\u2013", "not reached", "\u2013", "\u2013"],
    ]
    assert TABLE.markdown().splitlines()[2].startswith("| a_b | few | 2.5 | 1.25 ")


def test_small_numbers_are_not_hidden() -> None:
    """A cost below the last digit has two digits of its own; nothing stays nothing."""
    small = [number(value, 1) for value in (0.0314, 0.1, 0.0, 12.345)]

    assert [entry.text for entry in small] == ["0.031", "0.1", "0.0", "12.3"]
    assert mean(Spread(0.00042, 0.0001, 2), 1).text == "0.00042 \u00b1 0.00010"


def test_a_program_gets_whole_numbers() -> None:
    """In bytes and seconds, deviations and ends of a span in columns of their own; else nothing."""
    first, second = csv.DictReader(io.StringIO(TABLE.csv()))

    assert {name: first[name] for name in ("bytes", "loss", "loss_sd", "change")} == {
        "bytes": "2500000.0",
        "loss": "1.25",
        "loss_sd": "0.5",
        "change": "-0.125",
    }
    assert (first["peak_bytes_min"], first["peak_bytes_max"]) == ("1048576.0", "2097152.0")
    assert set(second.values()) == {"c", "few", ""}


def test_latex_is_set_with_booktabs() -> None:
    """Rules of the package, a row a line, and no letter that means something else."""
    lines = TABLE.latex().splitlines()

    assert [line for line in lines if line.endswith("rule")] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    assert r"\begin{tabular}{llrrrr}" in lines
    assert r"a\_b & few & 2.5 & 1.25 $\pm$ 0.50 & 1.0--2.0 & -12.5 \\" in lines
    assert r"\caption{Costs \& gains. All of it}" in lines
    assert latex("50% #1 {x} a^b~c\\d $") == (
        r"50\% \#1 \{x\} a\textasciicircum{}b\textasciitilde{}c\textbackslash{}d \$"
    )


def test_three_files_are_written(tmp_path: Path) -> None:
    """They have the table's name."""
    TABLE.write(tmp_path)

    assert {path.stem for path in tmp_path.iterdir()} == {"costs"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".md", ".tex"]
    assert (tmp_path / "costs.csv").read_text(encoding="utf-8") == TABLE.csv()
