"""The lock of a file of keys, which commands and a coordinator that serves change in turn.

Waiting for it is bounded, and whoever has it is named. Not here: the lock of a run's folder, which
is held as long as the run goes on (`coordinator/results/run_lock.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from edge_sdk.errors import StorageError

# Seconds for which another process that changes the file is waited for, and between two tries.
LOCK_S, _AGAIN_S = 10.0, 0.05


@contextlib.contextmanager
def locked(path: Path, *, is_patient: bool = True) -> Iterator[None]:
    """Hold the lock of the file at *path*.

    Args:
        path: What is about to be changed; the lock lies beside it.
        is_patient: Whether to wait, `LOCK_S` seconds, for another process that has it.

    Raises:
        StorageError: Another process has it, or there can be none.
    """
    seconds = LOCK_S if is_patient else 0.0
    name = path.with_name(path.name + ".lock")
    try:
        # For writing: who may only read it must not hold it.
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(f"cannot lock {path}: {name}: {error.strerror}") from error
    try:
        _mend(lock, path)
        until_s = time.monotonic() + seconds
        while not _takes(lock):
            if time.monotonic() >= until_s:
                raise StorageError(
                    f"cannot change {path}: {_holder(lock)} holds its lock {name}"
                    + (f", for {seconds:.0f} s and more" if seconds else "")
                )
            time.sleep(_AGAIN_S)
        yield
    finally:
        os.close(lock)


def _takes(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _mend(lock: int, path: Path) -> None:
    """Let those alone open a lock that is ours who can replace the file in its folder anyhow."""
    found, folder = os.fstat(lock), path.parent.stat()
    owner = path.stat() if path.exists() else folder
    mine = {os.geteuid()} | ({owner.st_uid} if os.geteuid() == 0 else set())
    if found.st_uid not in mine or found.st_nlink != 1 or not stat.S_ISREG(found.st_mode):
        return
    with contextlib.suppress(PermissionError):
        os.fchown(lock, owner.st_uid if os.geteuid() == 0 else -1, folder.st_gid)
    mode = 0o600
    if not folder.st_mode & stat.S_ISVTX:
        mode |= 0o060 if folder.st_mode & 0o020 and os.fstat(lock).st_gid == folder.st_gid else 0
        mode |= 0o006 if folder.st_mode & 0o002 else 0
    if stat.S_IMODE(found.st_mode) != mode:
        os.fchmod(lock, mode)


def _holder(lock: int) -> str:
    """Return who holds a lock, as far as the kernel tells us."""
    inode = f":{os.fstat(lock).st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1:2] == ["FLOCK"] and words[5].endswith(inode) and int(words[4]) > 0:
                return f"another process ({words[4]})"
    return "another process"
