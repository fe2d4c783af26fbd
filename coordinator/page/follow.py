"""The folder of a run, read again and again: of each file only what has come since."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.results.run_folder import RunFolder

# Lines of a file that are kept, the newest: days of a run with trouble all the time.
MOST_ROWS = 20_000
# Bytes of a file that are read at once; what is longer comes with the next look.
MOST_BYTES = 32 * 2**20


@dataclass
class _File:
    """What has been read of one file."""

    identity: tuple[int, int] = (0, 0)
    """Which file it was: one that is written anew is another one."""
    offset: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def read(self, path: Path) -> None:
        """Take in the whole lines that have come."""
        try:
            with path.open("rb") as file:
                status = path.stat()
                identity = status.st_dev, status.st_ino
                if identity != self.identity or status.st_size < self.offset:
                    self.identity, self.offset, self.rows = identity, 0, []
                file.seek(self.offset)
                found = file.read(MOST_BYTES)
        except OSError:  # not there yet, or being replaced: the next look finds it
            return
        whole = found[: found.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.rows.extend(row for line in whole.splitlines() if (row := _row(line)) is not None)
        del self.rows[:-MOST_ROWS]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # what a crash has left of a line
        return None
    return row if isinstance(row, dict) else None


class FollowedFolder(RunFolder):
    """A run's folder for somebody who looks on: it is never written to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files: dict[str, _File] = {}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a .jsonl file; the list is the same until the file changes."""
        mine = self._files.setdefault(name, _File())
        mine.read(self.path / name)
        return mine.rows

    def mark(self) -> tuple[object, ...]:
        """Return what differs whenever something was written to the run's files."""
        found = []
        for path in sorted(self.path.glob("*.json*")):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)
