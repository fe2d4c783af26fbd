"""Where a run that goes on can be spoken to, in as few bytes as the path of a socket may have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.results.run_folder import SOCKET

# `sun_path` has 108 bytes on Linux and 104 elsewhere, with a zero at its end.
MOST_PATH_BYTES = 103


@contextmanager
def socket_path(folder: Path) -> Iterator[str]:
    """Return a path of the socket in *folder* that is short enough, for as long as it is held.

    Of a long one, Linux knows a short name: that of the open folder.

    Raises:
        OSError: the folder cannot be opened.
    """
    direct = str(folder / SOCKET)
    if len(os.fsencode(direct)) <= MOST_PATH_BYTES:
        yield direct
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/{SOCKET}"
    finally:
        os.close(opened)
