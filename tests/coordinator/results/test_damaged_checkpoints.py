"""A checkpoint that is not as it was written is noticed, named, and an older one is used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from coordinator.results import run_folder
from coordinator.results.checkpoint_files import FORMAT, MANIFEST, STATE
from coordinator.results.run_folder import Checkpoint, RunFolder
from edge_sdk.errors import StorageError
from tests.damage import DAMAGES

FILES = ("state.json", "engine.safetensors", "ledger.safetensors", "manifest.json")


def checkpoint(value: float) -> Checkpoint:
    """A checkpoint that can be told from others."""
    arrays = {"w.A": np.full((20, 30), value, np.float32)}
    return Checkpoint({"step": value, "row": None}, {"engine": arrays, "ledger": arrays})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 10 and 20."""
    folder = RunFolder.create(tmp_path, "run")
    for step in (10, 20):
        folder.save_checkpoint(step, checkpoint(step), keep=2)
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_of_any_file_leads_to_the_older_one(
    run: RunFolder, name: str, damage: str
) -> None:
    """The older one is read as it was, the newer one is named with the reason, and stays there."""
    newest = run.checkpoints()[-1]
    DAMAGES[damage](newest / name)

    found = run.load_checkpoint()

    assert found.state["step"] == 10
    assert found.arrays["ledger"]["w.A"][0, 0] == 10
    (damaged,) = found.damaged
    assert damaged.checkpoint == newest
    assert damaged.reason
    assert newest.is_dir()
    aside = run.set_aside(newest)
    assert aside.name == "damaged-checkpoint-000020"
    assert aside.is_dir()
    assert not run.load_checkpoint().damaged


@pytest.mark.parametrize("name", FILES)
def test_every_bit_counts(run: RunFolder, name: str) -> None:
    """Whichever byte of a file changes, in whichever bit: none is read for what it was."""
    path = run.checkpoints()[-1] / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert run.load_checkpoint().state["step"] == 10, place
    path.write_bytes(whole)
    assert run.load_checkpoint().state["step"] == 20


def test_files_of_another_checkpoint_are_noticed(run: RunFolder) -> None:
    """A whole file of another step, a file that belongs to nothing, or a folder renamed."""
    older, newest = run.checkpoints()
    shutil.copyfile(older / "engine.safetensors", newest / "engine.safetensors")
    assert run.load_checkpoint().damaged[0].reason == "engine.safetensors is not as it was written"

    run.save_checkpoint(20, checkpoint(20), keep=2)
    (newest / "more.safetensors").write_bytes(b"")
    reason = run.load_checkpoint().damaged[0].reason
    assert reason == "more.safetensors does not belong to it"

    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    assert run.load_checkpoint().damaged[0].reason == "it is the one of step 10"


def test_none_that_is_whole_is_one_line_that_names_each(run: RunFolder) -> None:
    """The program ends with 9, and a person reads what is wrong with which."""
    older, newest = run.checkpoints()
    (older / "ledger.safetensors").unlink()
    (newest / "manifest.json").write_bytes(b"")

    with pytest.raises(StorageError) as caught:
        run.load_checkpoint()

    assert caught.value.exit_code == 9
    text = str(caught.value)
    assert "\n" not in text
    assert "checkpoint-000010 cannot be read: ledger.safetensors is missing" in text
    assert "checkpoint-000020 cannot be read" in text


def test_a_damaged_one_is_not_among_those_that_are_kept(run: RunFolder) -> None:
    """Set aside, it neither pushes a good one out nor is it ever removed."""
    older, newest = run.checkpoints()
    (newest / STATE).write_bytes(b"")
    aside = run.set_aside(run.load_checkpoint().damaged[0].checkpoint)

    run.save_checkpoint(20, checkpoint(20), keep=2)

    assert run.checkpoints() == [older, newest]
    (newest / STATE).write_bytes(b"")
    assert run.set_aside(newest).name == "damaged-checkpoint-000020-2"
    assert aside.is_dir()


def test_the_newest_is_the_one_of_the_last_step(run: RunFolder) -> None:
    """Clocks that jump by decades between two checkpoints change nothing."""
    older, newest = run.checkpoints()
    for path, year in ((older, 2**31 - 10), (newest, 0)):
        for file in (*path.iterdir(), path):
            os.utime(file, (year, year))

    assert run.load_checkpoint().state["step"] == 20
    run.save_checkpoint(30, checkpoint(30), keep=2)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-000020", "checkpoint-000030"]


def test_a_clock_that_goes_back_finds_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without a name of its own never meets the folder of another one."""
    monkeypatch.setattr(run_folder.time, "strftime", lambda _format: "19761128-220000")

    names = [RunFolder.create(tmp_path, None).name for _ in range(3)]

    assert names == ["19761128-220000", "19761128-220000-2", "19761128-220000-3"]


def test_a_checkpoint_of_version_0_1_0_is_read(run: RunFolder) -> None:
    """Without a manifest, and without the format in its state."""
    newest = run.checkpoints()[-1]
    (newest / MANIFEST).unlink()
    state = json.loads((newest / STATE).read_text())
    del state["format"]
    (newest / STATE).write_text(json.dumps(state, indent=2, sort_keys=True))

    found = run.load_checkpoint()

    assert found.state == {"step": 20.0, "row": None}
    assert not found.damaged


def test_a_later_format_is_refused_by_version(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No older checkpoint is used in its place: whoever wrote it can still go on with it."""
    with monkeypatch.context() as patch:
        patch.setattr("coordinator.results.checkpoint_files.FORMAT", FORMAT + 1)
        run.save_checkpoint(30, checkpoint(30), keep=3)

    with pytest.raises(StorageError, match=f"format {FORMAT + 1}, written by edgesplit") as caught:
        run.load_checkpoint()

    assert "\n" not in str(caught.value)
    assert "checkpoint-000030" in str(caught.value)


@pytest.mark.parametrize("step", [20, 30], ids=["same step", "next step"])
def test_who_reads_a_run_that_goes_on_takes_nothing_for_damaged(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A checkpoint that is replaced while it is read is read again."""
    real, replaced = run_folder.read_files, []

    def read(path: Path, of: int) -> object:
        if not replaced:
            replaced.append(path)
            (path / "engine.safetensors").unlink()  # as if it had been read half
            run.save_checkpoint(step, checkpoint(step), keep=1)
        return real(path, of)

    monkeypatch.setattr(run_folder, "read_files", read)

    found = run.load_checkpoint()

    assert found.state["step"] == step
    assert not found.damaged
    replaced.clear()
    assert not run.damages()


def test_what_somebody_else_put_there_is_no_checkpoint(run: RunFolder) -> None:
    """Other names, and files with such names, are left alone."""
    (run.path / "checkpoint-best").mkdir()
    (run.path / "checkpoint-000030").write_text("")

    assert run.load_checkpoint().state["step"] == 20
    run.save_checkpoint(40, checkpoint(40), keep=1)
    assert (run.path / "checkpoint-best").is_dir()
