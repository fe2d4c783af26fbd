"""Tables of results for a terminal: columns under each other, never wider than the screen.

A table with more columns than there is room for goes on below itself, with the columns that name
its rows repeated. Pure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

# Widest that a title makes a column; longer ones take several lines.
TITLE_WIDTH = 12
GAP = "  "


def aligned(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, num_names: int = 2
) -> str:
    """Return a table as lines of at most *width* letters where single columns allow it.

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
