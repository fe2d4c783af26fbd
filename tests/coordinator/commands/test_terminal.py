"""Tables of commands: drawn for people, Markdown for programs."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from coordinator.commands.terminal import Live, aligned, drawn, say_table
from coordinator.lab.comparison.result_table import markdown

TABLE = markdown(["method", "loss"], [["hsplitlora", "[1.5]"], ["ft", ""]])


RESULT_TITLES = ["method", "devices", "loss before training", "loss", "traffic (MB)"]
RESULT_ROWS = [
    ["hsplitlora", "few", "4.1234", "3.1", "12,345.6"],
    ["ft", "few", "4.1234", "2.95", "1.0"],
]


class Terminal(io.StringIO):
    """A screen."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_a_terminal_shows_no_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cells stand there without bars and rules; elsewhere the table is what it was."""
    screen, pipe = Terminal(), io.StringIO()

    monkeypatch.setattr("sys.stdout", screen)
    say_table(TABLE)
    monkeypatch.setattr("sys.stdout", pipe)
    say_table(TABLE)

    assert pipe.getvalue() == TABLE + "\n"
    assert "|" not in screen.getvalue()
    assert "---" not in screen.getvalue()
    assert all(word in screen.getvalue() for word in ("method", "hsplitlora", "[1.5]", "ft"))


def test_a_narrow_terminal_cuts_nothing() -> None:
    """Cells that are too long go on in the next line."""
    out = io.StringIO()

    Console(file=out, width=12).print(drawn(TABLE))

    letters = "".join(out.getvalue().split())
    assert "…" not in out.getvalue()
    assert all(letter in letters for letter in "hsplitlora")


def test_columns_stand_under_each_other() -> None:
    """Names to the left, numbers to the right, long titles on several lines."""
    assert aligned(RESULT_TITLES, RESULT_ROWS, 80).splitlines() == [
        "                     loss before",
        "method      devices     training  loss  traffic (MB)",
        "----------  -------  -----------  ----  ------------",
        "hsplitlora  few           4.1234   3.1      12,345.6",
        "ft          few           4.1234  2.95           1.0",
    ]


def test_what_has_no_room_goes_on_below() -> None:
    """With the names of the rows again, and every cell once."""
    text = aligned(RESULT_TITLES, RESULT_ROWS, 40)

    assert max(map(len, text.splitlines())) <= 40
    assert text.count("hsplitlora") == 2
    assert all(text.count(cell) == 1 for cell in ("3.1", "2.95", "12,345.6"))
    assert text.count("4.1234") == 2


def test_one_column_may_be_wider_than_the_screen() -> None:
    """Nothing is cut."""
    assert "x" * 50 in aligned(["a", "b", "c"], [["r", "s", "x" * 50]], 30)


def test_what_is_being_done_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal each text takes the place of the last; elsewhere there is one now and then."""
    screen, pipe, log, seconds = Terminal(), io.StringIO(), io.StringIO(), [0.0]
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(log)])

    for out in (screen, pipe):
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setenv("COLUMNS", "20")
        with Live(clock=lambda: seconds[0]) as live:
            live.now("first")
            live.now("second, and much more than fits")
            logging.getLogger("somebody").warning("take care")
            logging.getLogger("somebody").warning("take care")
            live.line("over")
            seconds[0] += 60.0
            live.now("third")

    assert screen.getvalue() == (
        "first\r\x1b[Ksecond, and much\nmore than fits\r\x1b[K\x1b[1A\x1b[Kover\nthird\r\x1b[K"
    )
    assert pipe.getvalue() == "first\nover\nthird\n"
    assert log.getvalue() == "take care\n" * 2  # once on each
