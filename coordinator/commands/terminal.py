"""What commands print as they go, and tables: drawn for a person, Markdown for a program."""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

# Letters of a line where there is no terminal that could say.
USUAL_WIDTH = 100
# Seconds between two lines about what is being done, where no line can take another's place.
QUIET_S = 10.0
# Widest that the title of a result makes its column; longer ones take several lines.
TITLE_WIDTH = 12
GAP = "  "


def say(text: str) -> None:
    """Print a line now."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_import() -> None:
    """Say what the next seconds are spent with, where they are."""
    if "torch" not in sys.modules:
        sys.stderr.write("importing torch\n")


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


class Live(logging.Filter):
    """Lines that stay, and one at the end that says what is being done. A context manager.

    Where there is no terminal, what is being done is a line now and then. What is logged meanwhile
    stands on lines of its own, and once: many runs of one thing warn of the same again and again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._said_s = clock, float("-inf")
        self._num_shown = 0
        self._logged: set[str] = set()

    def __enter__(self) -> Live:
        for handler in logging.getLogger().handlers:
            handler.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        for handler in logging.getLogger().handlers:
            handler.removeFilter(self)
        self._clear()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record says something new; make room for it."""
        text = record.getMessage()
        is_new = text not in self._logged
        self._logged.add(text)
        if is_new:
            self._clear()
        return is_new

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
        lines = textwrap.wrap(text, max(1, width - 1))
        sys.stdout.write("\n".join(lines))
        sys.stdout.flush()
        self._num_shown = len(lines)

    def _clear(self) -> None:
        if self._num_shown:
            sys.stdout.write("\r\x1b[K" + "\x1b[1A\x1b[K" * (self._num_shown - 1))
            sys.stdout.flush()
            self._num_shown = 0


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


# ---- results ----


def aligned(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, num_names: int = 2
) -> str:
    """Return a table as lines of at most *width* letters where single columns allow it.

    One with more columns goes on below itself, with the columns that name its rows repeated.

    Args:
        titles: Titles of the columns.
        rows: Texts of the rows.
        width: Letters of a line.
        num_names: Number of columns at the left that name a row.
    """
    heads = [_wrapped(title) for title in titles]
    widths = [
        max(len(text) for text in (*head, *(row[index] for row in rows)))
        for index, head in enumerate(heads)
    ]
    blocks = _blocks(widths, width, num_names)
    return "\n\n".join(_block(heads, rows, widths, block, num_names) for block in blocks)


def _wrapped(title: str) -> list[str]:
    """Return the lines of a title."""
    longest = max((len(word) for word in title.split()), default=0)
    return textwrap.wrap(title, max(TITLE_WIDTH, longest), break_on_hyphens=False) or [""]


def _blocks(widths: Sequence[int], width: int, num_names: int) -> list[list[int]]:
    """Return the columns that stand beside each other, block by block."""
    names = list(range(min(num_names, len(widths))))
    taken = sum(widths[index] + len(GAP) for index in names)
    blocks: list[list[int]] = []
    room = 0
    for index in range(len(names), len(widths)):
        if not blocks or widths[index] + len(GAP) > room:
            blocks.append([*names])
            room = width + len(GAP) - taken
        blocks[-1].append(index)
        room -= widths[index] + len(GAP)
    return blocks or [names]


def _block(
    heads: Sequence[Sequence[str]],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    columns: Sequence[int],
    num_names: int,
) -> str:
    height = max(len(heads[index]) for index in columns)
    lines = [
        [("", *heads[index])[max(0, line - height + len(heads[index]) + 1)] for index in columns]
        for line in range(height)
    ]
    lines.append(["-" * widths[index] for index in columns])
    lines += [[row[index] for index in columns] for row in rows]
    return "\n".join(_line(line, widths, columns, num_names) for line in lines)


def _line(
    texts: Sequence[str], widths: Sequence[int], columns: Sequence[int], num_names: int
) -> str:
    cells = [
        text.ljust(widths[index]) if index < num_names else text.rjust(widths[index])
        for text, index in zip(texts, columns, strict=True)
    ]
    return GAP.join(cells).rstrip()
