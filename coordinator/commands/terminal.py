"""What commands print as they go, and tables: drawn for a person, Markdown for a program."""

from __future__ import annotations

import sys
from typing import Any


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
