"""How benchmarks write their results: command, commit, hardware, then numbers."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "pyzmq", "numpy")


def kept_parser(about: str | None, out: str, names: Iterable[str]) -> argparse.ArgumentParser:
    """The flags of a benchmark that keeps its runs in a folder and does not run them again."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=Path(out), help="runs that are kept")
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="NAME")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser


def header(title: str, options: argparse.Namespace) -> str:
    """Title, command, commit and hardware."""
    script = Path(sys.argv[0]).name
    shown = " ".join(f"--{n} {v}" for n, v in vars(options).items() if v not in ("", None))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"# {title}\n\n"
        f"* command: `python benchmarks/{script} {shown}`\n"
        f"* commit: {commit()}\n"
        f"* hardware: {cpu()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB; no GPU\n"
        f"* software: Python {platform.python_version()}, {versions}\n"
        f"* date: {datetime.date.today().isoformat()}"
    )


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, text: str) -> Path:
    """Print a report and write it to benchmarks/results/<date>-<name>.md."""
    path = RESULTS / f"{datetime.date.today().isoformat()}-{name}.md"
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
    return path
