"""A note in the state folder while a plan runs: whoever finds it knows that nobody ended in order.

The kernel kills without a word where memory runs out, and the program that is started next, by a
person, a supervisor or systemd, would be given the same plan again. It finds the note, and in it
how many processes the kernel had killed until then: if these are more by now, memory was the
reason. After a power cut, a crash or somebody's `kill -9` they are not.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from edge_sdk.errors import OutOfMemory
from edge_sdk.files import atomic_write
from profiler.sensors.memory import ROOT, OomKills, oom_kills

NAME = "running.json"


class WasShort(OutOfMemory):
    """An earlier process of this device ended for want of memory; told in words of the plan."""

    is_public = True


class RunningNote:
    """The note of one device in one run.

    Args:
        folder: The device's state in that run.
        root: Root of the file system that the kernel's counts are read from.
    """

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self._file, self._root = folder / NAME, root

    def write(self, doing: str, *, was_short: bool = False) -> None:
        """Note that *doing* begins; or that memory was short while it was done, untold so far.

        Raises:
            StorageError: the folder cannot be written.
        """
        found = {"doing": doing, "was_short": was_short, **oom_kills(self._root)._asdict()}
        # Not synced: after a power cut it means nothing.
        atomic_write(self._file, json.dumps(found), sync=False, what="note")

    def remove(self) -> None:
        """Note that it has ended in order; a note that cannot be removed does no harm."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def short_while(self) -> str:
        """Return what was being done when memory was short; empty if it was not, or was told.

        A note that is damaged, or from another start of the machine, says nothing.
        """
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            doing, was_short = str(found.pop("doing")), bool(found.pop("was_short"))
            is_short = was_short or oom_kills(self._root).rose_since(OomKills(**found))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return ""
        return doing if is_short else ""
