"""Small files of the kernel: read as text, number or words; whatever cannot be read is None.

A sensor without power answers EAGAIN, a file of another user EACCES, a node that appears late is
not there yet: all of that is a missing value and no error.
"""

from __future__ import annotations

import re
from pathlib import Path


def read_text(file: Path) -> str | None:
    """Return what *file* says without white space around it and without NUL; None if nothing."""
    try:
        return file.read_bytes().decode("utf-8", "replace").replace("\0", " ").strip() or None
    except OSError:
        return None


def read_number(file: Path) -> int | None:
    """Return the number in *file*; None for `max`, for no such file, and for anything else."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def read_words(file: Path) -> list[str]:
    """Return the words in *file*; none if it cannot be read."""
    return (read_text(file) or "").split()


def find(root: Path, *patterns: str) -> list[Path]:
    """Return what matches the first pattern under *root* that matches anything, 2 before 10."""
    for pattern in patterns:
        found = sorted(root.glob(pattern), key=_natural)
        if found:
            return found
    return []


def shown(file: Path, root: Path) -> str:
    """Return *file* as it is called on the machine whose files are under *root*."""
    return f"/{file.relative_to(root)}"


def _natural(file: Path) -> list[str | int]:
    parts = re.split(r"(\d+)", str(file))
    return [int(part) if part.isdigit() else part for part in parts]
