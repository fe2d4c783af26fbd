"""A device's own checkpoints are whole or absent, and only the last ones are kept."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.client import checkpoints
from edge_sdk.client.checkpoints import LocalState
from edge_sdk.errors import StorageError
from tests.damage import DAMAGES

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


@pytest.fixture
def state(tmp_path: Path) -> LocalState:
    """A device that holds steps 10 and 20 of one plan."""
    found = LocalState(tmp_path / "run" / "a", "plan")
    found.prepare()
    for step in (10, 20):
        found.save(step, ARRAYS)
    return found


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_counts_as_not_held(
    state: LocalState, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Whatever has happened to it: it is named once, lies aside, and its step is not offered."""
    path = state.folder / "step-000020-plan.safetensors"
    DAMAGES[damage](path)

    with caplog.at_level(logging.WARNING):
        steps = [state.steps() for _ in range(2)]

    assert steps == [(10,), (10,)]
    if damage != "missing":
        assert (state.folder / f"damaged-{path.name}").exists()
        assert [record.message.split()[0] for record in caplog.records] == ["checkpoint.damaged"]
        assert path.name in caplog.text
    assert state.try_load(20, {}) is None
    state.save(20, ARRAYS)
    assert state.steps() == (10, 20)


def test_every_bit_counts(state: LocalState) -> None:
    """Whichever byte changes, in whichever bit, header and hash included."""
    path = state.folder / "step-000020-plan.safetensors"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(StorageError, match="step-000020"):
            state.load(20)
    path.write_bytes(whole)
    assert state.load(20).keys() == ARRAYS.keys()


@pytest.mark.parametrize("of", ["plan", "step", "device", "run"])
def test_a_whole_file_of_something_else_counts_as_not_held(state: LocalState, of: str) -> None:
    """A file of another plan, step, device or run under this name is no checkpoint of ours."""
    runs = state.folder.parent.parent
    other, step = {
        "plan": (LocalState(state.folder, "other"), 20),
        "step": (state, 10),
        "device": (LocalState(state.folder.parent / "b", "plan"), 20),
        "run": (LocalState(runs / "run-2" / "a", "plan"), 20),
    }[of]
    other.save(step, ARRAYS)
    path = other.folder / f"step-{step:06d}-{other.plan}.safetensors"

    shutil.copyfile(path, state.folder / "step-000020-plan.safetensors")

    assert 20 not in state.steps()


def test_arrays_of_other_shapes_count_as_not_held(state: LocalState) -> None:
    """What the plan in force does not have is not restored, also where no hash tells."""
    assert state.try_load(10, {"own:w.A": (2, 3)}) is not None
    assert state.try_load(10, {"own:w.A": (3, 3)}) is None
    assert state.try_load(20, {"own:v.A": (2, 3)}) is None
    assert state.steps() == ()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_moments_are_not_used(tmp_path: Path, damage: str) -> None:
    """Those of the end of the round, of the newest checkpoint, of the one before, or none."""
    state = LocalState(tmp_path)
    for step in (10, 20):
        state.save(step, {"optimizer:x": np.full(9, step, np.float32)})
    state.save_moments(30, {"optimizer:x": np.full(9, 30.0, np.float32)})
    found = []

    for name in ("end-000030", "step-000020", "step-000010"):
        found.append(state.moments(30)["optimizer:x"][0])
        DAMAGES[damage](tmp_path / f"{name}.safetensors")

    assert found == [30, 20, 10]
    assert state.moments(30) == {}


def test_a_checkpoint_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    """Without a hash, it is taken for whole as long as all of its numbers are numbers."""
    from safetensors.numpy import save_file

    state = LocalState(tmp_path, "plan")
    plain = {name: np.array(array, order="C") for name, array in ARRAYS.items()}
    save_file(plain, tmp_path / "step-000010-plan.safetensors")
    save_file({"x": np.full(2, np.nan, np.float32)}, tmp_path / "step-000020-plan.safetensors")

    assert state.steps() == (10,)
    assert state.load(10).keys() == ARRAYS.keys()


def test_a_later_format_counts_as_not_held(
    state: LocalState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named by its version and set aside; the coordinator sends everything."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + 1)
        state.save(20, ARRAYS)

    assert state.steps() == (10,)
    assert f"format {checkpoints.FORMAT + 1}, this version reads" in caplog.text


def test_a_run_that_went_back_leaves_no_later_step(state: LocalState) -> None:
    """Steps that come anew are not mixed up with those that were given up."""
    state.forget_after(10)

    assert state.steps() == (10,)


def test_what_cannot_be_opened_now_is_left_alone(
    state: LocalState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without descriptors a checkpoint counts as not held, and is there again with them."""

    def refuse(_path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert state.steps() == ()

    assert "Too many open files" in caplog.text
    assert state.steps() == (10, 20)


def test_names_that_are_none_of_ours_are_left_alone(state: LocalState) -> None:
    """A copy that somebody made does not end the device."""
    (state.folder / "step-copy.safetensors").write_bytes(b"")

    assert state.steps() == (10, 20)
