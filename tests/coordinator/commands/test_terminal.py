"""Tables of commands: drawn for people, Markdown for programs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from coordinator.commands.terminal import drawn, say_table
from coordinator.lab.comparison.result_table import markdown

TABLE = markdown(["method", "loss"], [["hsplitlora", "[1.5]"], ["ft", ""]])


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
