"""Keys that were refused, for an operator who recognises one: few, whoever knocks how often.

The coordinator keeps them in a file beside the allow-list, `NAME.refused`, readable by its owner
only; `coordinator client pending` reads it. Pure, but for reading and writing that file.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_sdk.errors import StorageError, printable
from edge_sdk.files import atomic_write
from edge_sdk.transport.keys import is_public_key

log = logging.getLogger(__name__)

# Keys of all addresses and of one (IPv6: of one network), the oldest make room.
MOST_KEYS, MOST_EACH = 64, 8
# An entry that was seen within this time, in seconds, makes room for no other address that has as
# many; what was not seen for the longer time is forgotten.
FRESH_S, STALE_S = 3600.0, 7 * 86400.0
# The file is written at most so often, in seconds.
WRITE_S = 2.0
# A clock time beyond every other: the year 5138.
_LAST_S = 1e11
_MOST_FILE_BYTES = 64 * 1024


@dataclass(slots=True)
class RefusedKey:
    """A key that came and is not registered."""

    key: str
    source: str
    """Address, or IPv6 network, from which it came last."""
    first_s: float
    """Clock times of the first and the last handshake, in seconds since 1970."""
    last_s: float
    times: int = 1


class RefusedKeys:
    """The refused keys of one allow-list, as a serving coordinator keeps them."""

    def __init__(self, allow_list: Path) -> None:
        self.path = refused_path(allow_list)
        self._keys = {one.key: one for one in read_refused(self.path)}
        self._is_written = True
        self._write_s = 0.0
        self._failed = False

    def note(self, key: str, source: str, clock_s: float) -> None:
        """Take note of a handshake that was refused."""
        self._is_written = False
        known = self._keys.pop(key, None)
        if known is not None and known.source == source:
            known.last_s, known.times = clock_s, known.times + 1
            self._keys[key] = known  # the latest are last
            return
        first_s, times = (clock_s, 1) if known is None else (known.first_s, known.times + 1)
        if self._has_room(source, clock_s):
            self._keys[key] = RefusedKey(key, source, first_s, clock_s, times)

    def _has_room(self, source: str, clock_s: float) -> bool:
        """Make room for a key of *source*; return whether there is some."""
        for stale in [one for one in self._keys.values() if one.last_s < clock_s - STALE_S]:
            del self._keys[stale.key]
        own = [one for one in self._keys.values() if one.source == source]
        if len(own) >= MOST_EACH:
            del self._keys[own[0].key]
            return True
        if len(self._keys) < MOST_KEYS:
            return True
        counts = Counter(one.source for one in self._keys.values())
        largest = max(counts.values())
        oldest = next(one for one in self._keys.values() if counts[one.source] == largest)
        if largest <= len(own) + 1 and oldest.last_s >= clock_s - FRESH_S:
            return False
        del self._keys[oldest.key]
        return True

    def save(self, now_s: float, is_registered: Callable[[str], bool]) -> None:
        """Write what is new, if it is time for that; *now_s* is monotonic.

        A disk that cannot be written costs this list and nothing else.
        """
        for key in [key for key in self._keys if is_registered(key)]:
            del self._keys[key]
            self._is_written = False
        if self._is_written or now_s < self._write_s:
            return
        self._is_written, self._write_s = True, now_s + WRITE_S
        rows = [asdict(one) for one in self._keys.values()]
        try:
            atomic_write(self.path, json.dumps({"refused": rows}, indent=1) + "\n", sync=False)
            self._failed = False
        except StorageError as error:
            if not self._failed:
                log.error("refused.unwritten error=%s", error)
            self._failed = True


def refused_path(allow_list: Path) -> Path:
    """Return where the refused keys of an allow-list are kept."""
    return allow_list.with_name(allow_list.name + ".refused")


def read_refused(path: Path) -> list[RefusedKey]:
    """Return the keys in the file at *path*, in their order; what is none is left out."""
    found: list[RefusedKey] = []
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        with path.open("rb") as file:
            rows = json.loads(file.read(_MOST_FILE_BYTES))["refused"]
        for row in rows[:MOST_KEYS]:
            one = RefusedKey(
                str(row["key"]),
                printable(str(row["source"]))[:64],
                float(row["first_s"]),
                float(row["last_s"]),
                int(min(row["times"], 1 << 53)),
            )
            if is_public_key(one.key) and 0 <= one.first_s <= one.last_s < _LAST_S:
                found.append(one)
    return found
