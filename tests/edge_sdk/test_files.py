"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import files
from edge_sdk.errors import StorageError
from edge_sdk.files import atomic_write, create_file, storage_errors


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Folders are made, the content is exactly what was given, the mode holds, nothing is left."""
    path = tmp_path / "a" / "b.json"

    atomic_write(path, "first\n")
    atomic_write(path, b"\xff\x00", mode=0o600, sync=False)

    assert path.read_bytes() == b"\xff\x00"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up half-way is one line with the file's name, and the old content stays."""
    path = tmp_path / "state"
    atomic_write(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        atomic_write(path, "new", what="checkpoint")

    assert str(caught.value) == f"cannot write checkpoint {path}: No space left on device"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    """A file that must be new has its mode from the start, and is never written twice."""
    path = tmp_path / "key"
    create_file(path, "secret\n", 0o600)

    with pytest.raises(StorageError, match="key: File exists"):
        create_file(path, "other", 0o600)

    assert path.read_text() == "secret\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_error_without_words_of_the_system_keeps_its_own() -> None:
    """An OSError that a library raised has no strerror; its text is shown instead."""
    with pytest.raises(StorageError, match="^cannot write here: why$"), storage_errors("here"):
        raise OSError("why")


def test_a_descriptor_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written once somebody has closed one; a lack that does not end is an error."""
    real, tries = os.open, iter([errno.EMFILE, errno.ENFILE])

    def scarce(*args: Any) -> int:
        number = next(tries, 0)
        if number:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(os, "open", scarce)
    atomic_write(tmp_path / "a", "there")
    assert (tmp_path / "a").read_text() == "there"

    tries = iter([errno.EMFILE] * 1000)
    monkeypatch.setattr(files, "DESCRIPTOR_S", 0.1)
    with pytest.raises(StorageError, match="Too many open files"):
        atomic_write(tmp_path / "a", "later")
