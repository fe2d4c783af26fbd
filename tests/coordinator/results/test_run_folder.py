"""A run folder survives crashes, full disks and read-only folders with one clear line at most."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.results.run_folder import CONFIG, Checkpoint, RunFolder
from edge_sdk import files
from edge_sdk.errors import ConfigError, StorageError


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A new run's folder."""
    return RunFolder.create(tmp_path, "run")


def checkpoint(value: float) -> Checkpoint:
    """A checkpoint that can be told from others, with awkward arrays."""
    ledger = {"pair:a:w.A": np.full((2, 3), value, np.float32), "rank-0": np.zeros((0, 4), "f4")}
    engine = {
        "optimizer:w.A.step": np.array(value, np.float32),
        "t": np.eye(3, dtype="f4")[:, ::-1],
    }
    return Checkpoint({"step": value, "row": None}, {"engine": engine, "ledger": ledger})


def test_a_checkpoint_comes_back_as_it_was(run: RunFolder) -> None:
    """State and arrays are the same after a trip through the disk, empty ones included."""
    saved = checkpoint(3.0)

    run.save_checkpoint(20, saved, keep=2)
    found = run.load_checkpoint()

    assert found.state == saved.state
    for name, arrays in saved.arrays.items():
        assert found.arrays[name].keys() == arrays.keys()
        for key, array in arrays.items():
            assert found.arrays[name][key].shape == array.shape
            np.testing.assert_array_equal(found.arrays[name][key], array)


@pytest.mark.parametrize(("keep", "expected"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_only_the_newest_are_kept(run: RunFolder, keep: int, expected: list[int]) -> None:
    """Older checkpoints go once a newer one is complete."""
    for step in range(1, 6):
        run.save_checkpoint(step, checkpoint(step), keep)

    assert [path.name for path in run.checkpoints()] == [f"checkpoint-{s:06d}" for s in expected]


def test_newest_is_by_number(run: RunFolder) -> None:
    """A million steps sort behind 999,999 although the text of the number does not."""
    run.save_checkpoint(999_999, checkpoint(1.0), keep=1)

    run.save_checkpoint(1_000_000, checkpoint(2.0), keep=1)

    assert run.load_checkpoint().state["step"] == 2.0
    assert len(run.checkpoints()) == 1


class Crash(BaseException):
    """The process dies here."""


OPERATIONS: list[tuple[Any, str]] = [
    (Path, "write_bytes"),
    (Path, "write_text"),
    (Path, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("crash_at", range(1, 14))
@pytest.mark.parametrize("step", [20, 40], ids=["same-step", "next-step"])
def test_a_crash_anywhere_leaves_a_whole_checkpoint(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, crash_at: int, step: int, after: bool
) -> None:
    """Dying before or after any operation on files leaves the old or the new one, whole."""
    run.save_checkpoint(20, checkpoint(1.0), keep=1)
    count = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == crash_at and not after:
                raise Crash
            result = operation(*args, **kwargs)
            if count == crash_at:
                raise Crash
            return result

        return call

    with monkeypatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            run.save_checkpoint(step, checkpoint(2.0), keep=1)
            crashed = False
        except Crash:
            crashed = True

    found = run.load_checkpoint()
    assert found.state["step"] in ((1.0, 2.0) if crashed else (2.0,))
    assert found.arrays.keys() == {"engine", "ledger"}
    assert found.arrays["ledger"]["pair:a:w.A"][0, 0] == found.state["step"]
    run.save_checkpoint(60, checkpoint(3.0), keep=1)
    assert run.load_checkpoint().state["step"] == 3.0
    assert len(run.checkpoints()) == 1


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("what", ["checkpoint", "text", "row"])
def test_a_full_or_read_only_disk_is_one_line(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, what: str, reason: int
) -> None:
    """The error names the file and the reason and ends the program with 9; old files stay."""
    run.write_text("a.txt", "old")
    run.save_checkpoint(1, checkpoint(1.0), keep=2)

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(reason, os.strerror(reason))

    writing: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: run.save_checkpoint(2, checkpoint(2.0), keep=2),
        "text": lambda: run.write_text("a.txt", "new"),
        "row": lambda: run.append("rows.jsonl", {"a": 1}),
    }
    with monkeypatch.context() as patch:
        for name in ("write_bytes", "write_text", "open"):
            patch.setattr(Path, name, refuse)
        patch.setattr(files, "open", refuse, raising=False)
        with pytest.raises(StorageError, match=os.strerror(reason)) as caught:
            writing[what]()

    assert caught.value.exit_code == 9
    assert "\n" not in str(caught.value)
    assert str(run.path) in str(caught.value)
    assert (run.path / "a.txt").read_text() == "old"
    assert run.load_checkpoint().state["step"] == 1.0


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A file where the runs' folder should be is a storage error, not a traceback."""
    (tmp_path / "runs").write_text("")

    with pytest.raises(StorageError, match="cannot write run folder"):
        RunFolder.create(tmp_path / "runs", "a")


def test_a_run_is_never_overwritten(run: RunFolder) -> None:
    """A name that is taken is refused with what to do instead."""
    with pytest.raises(ConfigError, match="exists; choose another name, or `coordinator resume"):
        RunFolder.create(run.path.parent, "run")


def test_a_folder_that_is_no_run_is_refused(run: RunFolder) -> None:
    """Only a folder with a resolved config is a run."""
    with pytest.raises(ConfigError, match=f"no run folder: it has no {CONFIG}"):
        RunFolder.open(run.path)

    run.write_text(CONFIG, "")

    assert RunFolder.open(run.path).name == "run"


def test_without_a_checkpoint_there_is_nothing_to_resume(run: RunFolder) -> None:
    """A run that died before its first checkpoint says so."""
    (run.path / "checkpoint-000001").mkdir()

    with pytest.raises(StorageError, match="holds no checkpoint"):
        run.load_checkpoint()


@pytest.mark.parametrize("name", ["state.json", "engine.safetensors"])
def test_a_damaged_checkpoint_is_a_storage_error(run: RunFolder, name: str) -> None:
    """Garbage in a checkpoint is named, not raised as somebody else's exception."""
    path = run.save_checkpoint(1, checkpoint(1.0), keep=2)
    (path / name).write_bytes(b"\xff{garbage")

    with pytest.raises(StorageError, match="checkpoint-000001 cannot be read"):
        run.load_checkpoint()


def test_a_cut_off_line_is_left_out_and_costs_no_other(run: RunFolder) -> None:
    """A line that a crash has cut off is skipped, and those written later are not lost."""
    run.append("events.jsonl", {"n": 1})
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"n": 2, "ev')
    before = run.rows("events.jsonl")

    run.append("events.jsonl", {"n": 3})

    assert before == [{"n": 1}]
    assert run.rows("events.jsonl") == [{"n": 1}, {"n": 3}]


def test_rows_of_rounds_to_come_are_dropped(run: RunFolder) -> None:
    """Rows from a round on are forgotten, what a crash has cut off with them."""
    for round_ in range(4):
        run.append("metrics.jsonl", {"round": round_})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"rou')

    run.drop_rows_from("metrics.jsonl", 2)
    run.drop_rows_from("absent.jsonl", 2)

    assert (run.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n'
    assert run.rows("absent.jsonl") == []
