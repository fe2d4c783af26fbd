"""Files that are there whole or not at all, and one clear line where they cannot be written."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from edge_sdk.errors import StorageError

# What runs leave behind tells of private data: adapters, moments, losses, names.
PRIVATE = 0o600
# Seconds for which a descriptor is waited for, and between two tries.
DESCRIPTOR_S, AGAIN_S = 5.0, 0.02
# The system's trouble of the moment, or that of rights: the file itself may well be whole.
_NOT_OF_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)


def is_damage(error: OSError) -> bool:
    """Return whether a file that could not be read is itself the reason."""
    return error.errno not in _NOT_OF_THE_FILE


def open_patiently(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """Open a file as `os.open` does; wait a little where no descriptor is left for it.

    A burst of connections may take them all, until those that are too many are closed.
    """
    until_s = time.monotonic() + DESCRIPTOR_S
    while True:
        try:
            return os.open(path, flags, mode)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or time.monotonic() >= until_s:
                raise
        time.sleep(AGAIN_S)


@contextmanager
def storage_errors(what: object) -> Iterator[None]:
    """Turn an OSError, such as a full disk or a read-only folder, into a StorageError.

    Args:
        what: What is being written, for the message.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {what}: {error.strerror or error}") from error


def atomic_write(
    path: Path,
    data: bytes | bytearray | str,
    *,
    mode: int = PRIVATE,
    sync: bool = True,
    what: str = "",
) -> None:
    """Write a file that others may be reading or writing: they see all of it or nothing.

    Args:
        path: The file; folders above it that are missing are made.
        data: Its content; text is written as UTF-8.
        mode: Permissions of the file, less the process's umask; its owner's alone by default.
        sync: Make it survive a power cut too.
        what: What the file is, for the message of an error.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    with atomic_file(path, mode=mode, sync=sync, what=what) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(
    path: Path, *, mode: int = PRIVATE, sync: bool = True, what: str = ""
) -> Iterator[BinaryIO]:
    """Open a file for writing that becomes *path* when it is closed; see `atomic_write`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with storage_errors(f"{what} {path}".lstrip()):
        make_folder(path.parent)
        try:
            with open(temporary, "wb", opener=partial(open_patiently, mode=mode)) as file:
                yield file
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if sync:
            _sync(path.parent)  # the name, too, must survive


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it that are missing, so that a power cut leaves them there."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for made in reversed(missing):
        made.mkdir(mode, exist_ok=True)
        _sync(made.parent)
    path.mkdir(exist_ok=True)  # what is there and no folder is an error


def make_private(path: Path) -> None:
    """Make a folder that its owner alone may look into, and those above it that are missing.

    One that is there, and is ours, becomes private now: an earlier version left it open to others.
    """
    make_folder(path, 0o700)
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(0o700)


@contextmanager
def private_files() -> Iterator[None]:
    """Let whatever is written meanwhile, by libraries as well, be its owner's alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def open_private(path: Path, mode: str) -> BinaryIO:
    """Open a file for bytes; a new one is its owner's alone."""
    file: Any = open(path, mode, opener=partial(open_patiently, mode=PRIVATE))  # noqa: SIM115
    opened: BinaryIO = file
    return opened


def write_synced(path: Path, data: bytes) -> None:
    """Write a file of which nobody knows yet, so that its content survives a power cut."""
    with open_private(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def create_file(path: Path, text: str, mode: int) -> None:
    """Write a new file; one that is there already is left alone.

    Raises:
        StorageError: it is there already, or cannot be written.
    """
    with storage_errors(path), open(path, "x", opener=partial(open_patiently, mode=mode)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def identity(path: Path) -> tuple[int, int, int, int]:
    """Return inode, size, and the times in ns of a file's content and of its last change at all.

    Who writes to a file changes this; who then sets the time of its content back, changes the
    other time.

    Raises:
        OSError: it is not there.
    """
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, survive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = open_patiently(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no such thing for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
