"""Whoever changes a file of keys waits for another process, but not for ever."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.gateway.keys import list_lock
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from coordinator.gateway.keys.list_lock import locked
from edge_sdk.errors import StorageError
from edge_sdk.transport.keys import make_key_pair

KEY = make_key_pair().public


def change_list(folder: Path) -> None:
    """Register a device."""
    AllowList(folder / "devices.yaml").register("x", KEY)


def change_book(folder: Path) -> None:
    """Make a code."""
    EnrolmentBook(folder / "devices.yaml").make_code("x", "tcp://10.0.0.1:7070", KEY)


FILES = [("devices.yaml", change_list), ("devices.yaml.codes", change_book)]


@pytest.mark.parametrize(("name", "change"), FILES)
def test_a_lock_that_is_held_ends_in_one_line(
    name: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who holds the lock for good is named after a while, and what was there before stands."""
    monkeypatch.setattr(list_lock, "LOCK_S", 0.2)
    change(tmp_path)
    before = (tmp_path / name).read_bytes()

    with (tmp_path / f"{name}.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=rf"another process.* holds its lock .*{name}\.lock"):
            change(tmp_path)

    assert (tmp_path / name).read_bytes() == before
    change(tmp_path)


@pytest.mark.parametrize(("name", "change"), FILES)
def test_a_link_in_its_place_is_no_lock(
    name: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    """What a link leads to is neither locked nor given away."""
    (tmp_path / "target").touch(0o644)
    (tmp_path / f"{name}.lock").symlink_to(tmp_path / "target")

    with pytest.raises(StorageError, match=rf"{name}\.lock: Too many levels of symbolic links"):
        change(tmp_path)

    assert not (tmp_path / name).exists()


def test_who_cannot_wait_is_told_at_once(tmp_path: Path) -> None:
    """The thread that serves everybody does not sleep."""
    path = tmp_path / "file"
    with (
        locked(path),
        pytest.raises(StorageError, match="holds its lock"),
        locked(path, is_patient=False),
    ):
        pass
