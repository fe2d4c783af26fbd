"""A device's own checkpoints are whole or absent, and only the last ones are kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.client.checkpoints import LocalState
from edge_sdk.errors import StorageError

ARRAYS = {
    "own:w.A": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1],
    "optimizer:w.A.step": np.array(3.0, np.float32),
    "residual:w.V": np.zeros((0, 3), np.float32),
}


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Every array keeps its shape and numbers, scalars and empty ones included."""
    state = LocalState(tmp_path / "run" / "device")

    state.save(20, ARRAYS)
    found = state.load(20)

    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    """The round that runs and the one before it, by number and not by text."""
    state = LocalState(tmp_path)

    for step in (0, 999_999, 1_000_000, 1_000_020):
        state.save(step, ARRAYS)

    assert state.steps() == (1_000_000, 1_000_020)


def test_the_same_step_is_written_over(tmp_path: Path) -> None:
    """A round that starts again leaves its newest state."""
    state = LocalState(tmp_path)

    for value in (1.0, 2.0):
        state.save(5, {"x": np.full(1, value, np.float32)})

    assert state.steps() == (5,)
    assert state.load(5)["x"].tolist() == [2.0]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Half a checkpoint of an earlier process goes, a whole one stays."""
    state = LocalState(tmp_path)
    state.save(10, ARRAYS)
    (tmp_path / ".step-000020.safetensors.1-1.tmp").write_bytes(b"half")

    state.prepare()

    assert {path.name for path in tmp_path.iterdir()} == {"step-000010.safetensors", ".writable"}


def test_a_folder_that_is_absent_holds_nothing(tmp_path: Path) -> None:
    """A new device has no checkpoints, and asking for one is a storage error."""
    state = LocalState(tmp_path / "absent")

    assert state.steps() == ()
    with pytest.raises(StorageError, match="cannot read checkpoint"):
        state.load(3)


def test_garbage_is_a_storage_error(tmp_path: Path) -> None:
    """A damaged file is named."""
    state = LocalState(tmp_path)
    state.save(1, ARRAYS)
    next(tmp_path.glob("step-*")).write_bytes(b"\xffgarbage")

    with pytest.raises(StorageError, match="step-000001.safetensors"):
        state.load(1)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    """One line with the reason, exit code 9, and what was there stays."""
    state = LocalState(tmp_path)
    state.save(1, ARRAYS)

    def refuse(*_args: Any) -> Any:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=os.strerror(reason)) as caught:
        state.save(2, ARRAYS)

    assert caught.value.exit_code == 9
    assert state.steps() == (1,)
    assert state.load(1).keys() == ARRAYS.keys()
