"""Files that are there whole or not at all, and one clear line where they cannot be written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from edge_sdk.errors import StorageError


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
    path: Path, data: bytes | str, *, mode: int = 0o666, sync: bool = True, what: str = ""
) -> None:
    """Write a file that others may be reading or writing: they see all of it or nothing.

    Args:
        path: The file; folders above it that are missing are made.
        data: Its content; text is written as UTF-8.
        mode: Permissions of the file, less the process's umask.
        sync: Make it survive a power cut too.
        what: What the file is, for the message of an error.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with storage_errors(f"{what} {path}".lstrip()):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb", opener=partial(os.open, mode=mode)) as file:
                file.write(data.encode() if isinstance(data, str) else data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def create_file(path: Path, text: str, mode: int) -> None:
    """Write a new file; one that is there already is left alone.

    Raises:
        StorageError: it is there already, or cannot be written.
    """
    with storage_errors(path), open(path, "x", opener=partial(os.open, mode=mode)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make sure that a file or a folder survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
