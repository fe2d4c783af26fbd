"""Who holds a run: one coordinator at a time, which the kernel forgets when its process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edge_sdk.errors import ConfigError, printable
from edge_sdk.files import PRIVATE, make_private, storage_errors

log = logging.getLogger(__name__)

LOCK = ".lock"


# Seconds for which a lock is tried: whoever asks whether a run is held takes it for a moment.
TRY_S, AGAIN_S = 0.2, 0.01


def is_held(folder: Path) -> bool:
    """Return whether a process holds the run in *folder* now."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file, or a file system without locks
        return False
    return False


def holder(folder: Path) -> str:
    """Return who holds the run in *folder*, by the process's own word."""
    try:
        found = (folder / LOCK).read_text(encoding="utf-8", errors="replace")[:200].strip()
    except OSError:
        found = ""
    return printable(found) or "another process"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run in *folder* for as long as the context lasts, or this process lives.

    Raises:
        ConfigError: another process holds it.
        StorageError: the folder cannot be written.
    """
    with storage_errors(folder / LOCK):
        make_private(folder)  # one of an earlier version was open to others
        (folder / LOCK).touch(PRIVATE)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    with file:
        try:
            _take(file)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"run folder {folder} is in use by {holder(folder)}; wait for its end, or stop "
                    "it first"
                ) from error
            # Some network file systems have no locks; a run is worth more than this guard.
            log.warning("lock.absent folder=%s reason=%s", folder, error.strerror)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with storage_errors(folder / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} since {since}")
            file.flush()
        yield


def _take(file: IO[str]) -> None:
    """Lock *file*; try again for a moment where somebody has it."""
    until_s = time.monotonic() + TRY_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK or time.monotonic() >= until_s:
                raise
            time.sleep(AGAIN_S)
        else:
            return
