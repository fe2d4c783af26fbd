"""What commands print as they go, and tables: drawn for a person, Markdown for a program."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from coordinator.commands.aligned import aligned

# Letters of a line where there is no terminal that could say.
USUAL_WIDTH = 100
# Seconds between two lines about what is being done, where no line can take another's place.
QUIET_S = 10.0


def say(text: str) -> None:
    """Print a line now."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_table(markdown: str) -> None:
    """Print a table that is written in Markdown: drawn on a terminal, as it stands elsewhere."""
    if not sys.stdout.isatty():
        say(markdown)
        return
    from rich.console import Console

    Console(file=sys.stdout, highlight=False).print(drawn(markdown))


def say_results(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of results under its title, as wide as the terminal is."""
    width = shutil.get_terminal_size((USUAL_WIDTH, 24)).columns
    say(f"\n{title}\n\n{aligned(titles, rows, width)}")


class Live:
    """Lines that stay, and one at the end that says what is being done. A context manager.

    Where there is no terminal, what is being done is a line now and then.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._said_s = clock, float("-inf")
        self._is_shown = False

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        self._said_s = self._clock()
        say(text)

    def now(self, text: str) -> None:
        """Say what is being done, in the place of what was said before."""
        if not sys.stdout.isatty():
            if self._clock() - self._said_s >= QUIET_S:
                self.line(text)
            return
        self._clear()
        width = shutil.get_terminal_size((USUAL_WIDTH, 24)).columns
        sys.stdout.write(text if len(text) < width else f"{text[: width - 4]}...")
        sys.stdout.flush()
        self._is_shown = True

    def _clear(self) -> None:
        if self._is_shown:
            sys.stdout.write("\r\x1b[K")
            self._is_shown = False


def drawn(markdown: str) -> Any:
    """Return a Markdown table as one that rich draws; too narrow columns are folded, never cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(line) for line in markdown.splitlines() if line.lstrip().startswith("|")]
    head, rule, *body = rows
    table = Table(box=box.SIMPLE_HEAD)
    for title, dashes in zip(head, rule, strict=True):
        side: Any = "right" if dashes.endswith(":") else "left"
        table.add_column(Text(title), justify=side, overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    return table


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
