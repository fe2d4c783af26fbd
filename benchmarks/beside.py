"""A benchmark in an older checkout beside the same benchmark here, in turn.

    python benchmarks/beside.py --name wire OLDER -- wire.py --sizes 1024 --no-write

Runs the script in OLDER (a clone at the older commit, with ../shared beside it where it has one)
and in this checkout, in turn, and reads the numbers of the Markdown tables that it prints: the
first number of each cell. Each cell gets the median of either side and new / old.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from report import RESULTS, header, save, table

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"^-?\d+(\.\d+)?")
Cell = tuple[str, str]


def numbers(text: str) -> dict[Cell, float]:
    """The number of each cell of all tables in *text*, by the words of its row and its column."""
    found: dict[Cell, float] = {}
    heads: list[str] = []
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or set(line) <= set("|-: "):
            continue
        if below.startswith("|") and set(below) <= set("|-: "):
            heads = cells
            continue
        if len(heads) != len(cells):  # a row that is printed before its table is complete
            heads = [f"column {number + 1}" for number in range(len(cells))]
        # A row may begin with a number that names it, such as a size.
        row = ", ".join(dict.fromkeys([cells[0], *(c for c in cells if not NUMBER.match(c))]))
        for head, cell in zip(heads[1:], cells[1:], strict=True):
            if match := NUMBER.match(cell):
                found[row, head] = float(match[0])
    return found


def run(checkout: Path, command: list[str]) -> dict[Cell, float]:
    """Run the script of *checkout*, with that checkout's packages."""
    done = subprocess.run(
        [sys.executable, str(checkout / "benchmarks" / command[0]), *command[1:]],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return numbers(done.stdout)


def commit_of(checkout: Path) -> str:
    """The short name of the commit that *checkout* is at."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Run both in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("older", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", required=True, help="ends the name of the file of results")
    parser.add_argument("command", nargs="+", help="script of benchmarks and its arguments")
    options = parser.parse_args()
    command = [word for word in options.command if word != "--"]
    sides: dict[Cell, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    before = set(RESULTS.iterdir())
    for turn in range(options.repeats):
        for side, checkout in enumerate((options.older.resolve(), ROOT)):
            for cell, value in run(checkout, command).items():
                sides[cell][side].append(value)
        print(f"turn {turn + 1} of {options.repeats} done", file=sys.stderr, flush=True)
    for path in set(RESULTS.iterdir()) - before:  # what the benchmark itself has written here
        path.unlink()
    rows = []
    for (row, head), (old, new) in sides.items():
        if not old or not new:
            continue
        first, second = statistics.median(old), statistics.median(new)
        spread = f"{min(new):g}-{max(new):g}"
        ratio = f"{second / first:.3f}" if first else ""
        rows.append(
            (row, head, f"{first:g} ({min(old):g}-{max(old):g})", f"{second:g} ({spread})", ratio)
        )
    said = (
        f"* command: `python benchmarks/beside.py --name {options.name} --repeats "
        f"{options.repeats} OLDER -- {' '.join(command)}`, OLDER at {commit_of(options.older)}"
    )
    text = re.sub(
        r"^\* command: .*$",
        lambda _: said,
        header(f"Before and after: {command[0]}", options),
        flags=re.MULTILINE,
    )
    text += (
        f"\n\nMedian of {options.repeats} runs a side, in turn; in brackets lowest and highest.\n\n"
    )
    save(f"beside-{options.name}", text + table(("row", "column", "old", "new", "new / old"), rows))


if __name__ == "__main__":
    main()
