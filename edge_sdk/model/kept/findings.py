"""What was found out about files, kept beside what they looked like, so that it is not done again.

A finding counts as long as every file looks the same: place on disk, size, time of its content,
time of its last change of any kind. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_sdk.errors import StorageError, one_line
from edge_sdk.files import atomic_write, identity

log = logging.getLogger(__name__)

Clock = Callable[[], float]
"""Seconds since 1970, as file systems count them."""
Looks = Mapping[str, list[int]]
"""What files looked like, by path; those that are not there are left out."""
# A file that was written less than so many seconds ago may be written again and look the same:
# file systems keep times in steps, some of 2 s.
SETTLED_S = 2.0


def looks_of(paths: Iterable[Path]) -> Looks:
    """Return what files look like now."""
    found: dict[str, list[int]] = {}
    for path in sorted(set(paths)):
        with suppress(FileNotFoundError, NotADirectoryError):
            found[str(path)] = list(identity(path))
    return found


def is_settled(looks: Looks, now_s: float) -> bool:
    """Return whether every file would look otherwise if it was written again from *now_s* on."""
    return all(max(times) < (now_s - SETTLED_S) * 1e9 for _, _, *times in looks.values())


class Findings:
    """Values by name, kept in one file; what is damaged is forgotten, with a warning."""

    def __init__(self, path: Path, clock: Clock = time.time) -> None:
        self._path, self.clock = path, clock

    def read(self) -> dict[str, Any]:
        """Return everything that is kept; nothing where it cannot be read or is damaged."""
        try:
            kept = json.loads(self._path.read_text("utf-8"))
            values: dict[str, Any] = kept["values"]
            if kept["sha256"] != _digest(values):
                raise ValueError("its hash is another one")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = one_line(error)
            log.warning("findings.damaged file=%s reason=%s; found anew", self._path, reason)
            return {}
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Keep *values* and nothing else; a folder that cannot be written costs time alone."""
        with suppress(StorageError):
            text = json.dumps({"sha256": _digest(values), "values": values})
            atomic_write(self._path, text, mode=0o666, sync=False)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
