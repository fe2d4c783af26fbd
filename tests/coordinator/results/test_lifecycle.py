"""A run's folder belongs to one process at a time, and is taken up at any moment of its life."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from coordinator.config.run import ServeConfig
from coordinator.results import run_lock
from coordinator.results.checkpoint_files import FORMAT
from coordinator.results.events.event import RunEvent
from coordinator.results.events.run import CheckpointDamaged
from coordinator.results.lifecycle import ENVIRONMENT, new_folder, read_run, reopened, take_up
from coordinator.results.run_folder import CONFIG, Checkpoint, RunFolder
from coordinator.results.run_lock import LOCK, locked
from edge_sdk.config.describe import dump_config
from edge_sdk.errors import ConfigError, EdgeError, StorageError
from tests.damage import DAMAGES

VERSION = metadata.version("edgesplit")
HOLD = """
import sys, time
from pathlib import Path
from coordinator.results.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    """A run that has a name."""
    return ServeConfig(
        model="m",
        secret_key=tmp_path / "key",
        allow_list=tmp_path / "d.yaml",
        runs=tmp_path / "runs",
        name="run",
    )


def checkpoint(step: int) -> Checkpoint:
    """A checkpoint of *step*."""
    return Checkpoint({"step": step}, {"ledger": {"x": np.full(9, step, np.float32)}})


def born(config: ServeConfig, *steps: int) -> RunFolder:
    """A run with checkpoints of these steps."""
    with new_folder(config) as folder:
        for step in steps:
            folder.append("metrics.jsonl", {"round": step})
            folder.save_checkpoint(step, checkpoint(step), keep=9)
    return folder


# ---- who holds a run ----


def test_a_run_is_held_by_one_process_and_given_free_by_its_death(tmp_path: Path) -> None:
    """The second one is told who holds it since when; a killed holder leaves nothing behind."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            for _ in range(2):
                words = f"{tmp_path} is in use by process {holder.pid} since 2"
                with pytest.raises(ConfigError, match=words) as caught, locked(tmp_path):
                    pass
                assert caught.value.exit_code == 2
                assert "\n" not in str(caught.value)
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()

    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_neither_a_new_run_nor_one_that_goes_on_disturbs_its_holder(config: ServeConfig) -> None:
    """Both are refused while it is held, and nothing is lost by the attempt."""
    with new_folder(config) as folder:
        folder.append("events.jsonl", {"n": 1})
        with pytest.raises(ConfigError, match="in use by process"), new_folder(config):
            pass
        folder.save_checkpoint(1, checkpoint(1), keep=1)
        with pytest.raises(ConfigError, match="in use by"), reopened(folder.path, []):
            pass

        assert folder.rows("events.jsonl") == [{"n": 1}]
        assert folder.load_checkpoint().state["step"] == 1  # as `coordinator export` does


@pytest.mark.parametrize("year", ["1976", "2076"])
def test_a_clock_that_jumps_does_not_lock_anybody_out(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch, year: str
) -> None:
    """Locks are the kernel's: the time in one is for a person only."""
    folder = born(config, 1)
    monkeypatch.setattr(run_lock.time, "strftime", lambda _format: f"{year}-11-28 22:00:00")

    with reopened(folder.path, []) as run:
        assert f"since {year}" in (folder.path / LOCK).read_text()
        assert run.checkpoint is not None


# ---- at any moment ----

# What there is of a run that was killed after so much of its beginning.
BEGINNINGS: dict[str, tuple[str, ...]] = {
    "before anything": (),
    "before its config": (LOCK,),
    "while its config was written": (LOCK, f".{CONFIG}.1-1.tmp"),
    "before env.json": (LOCK, CONFIG),
    "before its first event": (LOCK, CONFIG, ENVIRONMENT),
    "before its first checkpoint": (LOCK, CONFIG, ENVIRONMENT, "events.jsonl", "metrics.jsonl"),
}


@pytest.mark.parametrize("there", BEGINNINGS.values(), ids=BEGINNINGS.keys())
def test_a_run_that_has_not_begun_is_served_again(
    config: ServeConfig, there: tuple[str, ...]
) -> None:
    """`serve` begins anew, with its own config, and nothing of the first attempt is mixed in."""
    path = config.runs / "run"
    path.mkdir(parents=True)
    for name in there:
        text = '{"round": 0}\n' if name == "metrics.jsonl" else ""
        (path / name).write_text(dump_config(config) if name == CONFIG else text)

    with new_folder(replace(config, rounds=7)) as folder:
        assert not folder.rows("metrics.jsonl")
        folder.save_checkpoint(0, checkpoint(0), keep=1)

    assert read_run(path, [])[1].rounds == 7


@pytest.mark.parametrize(
    "there", [names for names in BEGINNINGS.values() if CONFIG in names], ids=len
)
def test_a_run_that_has_not_begun_is_resumed_from_its_start(
    config: ServeConfig, there: tuple[str, ...]
) -> None:
    """`resume` takes its config, and drops what the first attempt has measured."""
    path = config.runs / "run"
    path.mkdir(parents=True)
    for name in there:
        text = '{"round": 0}\n' if name == "metrics.jsonl" else ""
        (path / name).write_text(dump_config(config) if name == CONFIG else text)
    (path / ".checkpoint-000000.tmp").mkdir()

    with reopened(path, ["rounds=7"]) as (folder, found, newest):
        assert newest is None
        assert found.rounds == 7
        assert not folder.rows("metrics.jsonl")
        assert (path / ENVIRONMENT).is_file()


def test_without_a_config_resume_says_what_goes_on(tmp_path: Path) -> None:
    """Nothing is known of such a run: it is served."""
    with pytest.raises(ConfigError, match="begin a run with `coordinator serve`"):
        read_run(tmp_path, [])


def test_a_run_that_has_begun_is_never_begun_anew(config: ServeConfig) -> None:
    """`serve` names the command that goes on, or says that nothing is left to do."""
    folder = born(config, 1)
    folder.append("events.jsonl", {"event": "run.started"})
    words = f"coordinator resume {folder.path}"
    with pytest.raises(ConfigError, match=words), new_folder(config):
        pass

    folder.append("events.jsonl", {"event": "run.ended", "outcome": "completed"})
    words = "its run is complete: choose another name"
    with pytest.raises(ConfigError, match=words), new_folder(config):
        pass
    assert folder.load_checkpoint().state["step"] == 1


@pytest.mark.parametrize("kept", ["notes.txt", "adapter", "damaged-checkpoint-000001"])
def test_a_folder_with_anything_else_in_it_is_left_alone(config: ServeConfig, kept: str) -> None:
    """What no run that has not begun leaves may be somebody's only copy."""
    path = config.runs / "run"
    (path / kept).mkdir(parents=True)
    (path / CONFIG).write_text(dump_config(config))

    with pytest.raises(ConfigError, match="exists; choose another name"), new_folder(config):
        pass

    assert (path / kept).is_dir()


def test_rows_without_a_checkpoint_are_never_dropped(config: ServeConfig) -> None:
    """A run whose checkpoints somebody has removed keeps what it measured."""
    with new_folder(config) as folder:
        for round_ in range(3):
            folder.append("metrics.jsonl", {"round": round_})

    with pytest.raises(ConfigError, match="exists"), new_folder(config):
        pass
    with pytest.raises(StorageError, match="holds no checkpoint"), reopened(folder.path, []):
        pass
    assert len(folder.rows("metrics.jsonl")) == 3


# ---- what is there is checked ----


def test_a_later_version_of_the_folder_is_refused_in_one_line(config: ServeConfig) -> None:
    """By the folder's name and by both versions; nothing is changed."""
    folder = born(config, 1)
    about = json.loads((folder.path / ENVIRONMENT).read_text())
    assert about["format"] == FORMAT
    about |= {"format": FORMAT + 1, "edgesplit": "9.9.9"}
    (folder.path / ENVIRONMENT).write_text(json.dumps(about))

    with pytest.raises(StorageError) as caught, reopened(folder.path, []):
        pass

    words = f"{folder.path} is of format {FORMAT + 1}, written by edgesplit 9.9.9"
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


ENVIRONMENTS = ["", "{", "[]", "\x00", '{"python": "3.10"}', '{"edgesplit": "0.1.0"}']


@pytest.mark.parametrize("text", [*ENVIRONMENTS, f'{{"edgesplit": "{VERSION}", "format": 6}}'])
def test_a_run_does_not_need_its_env_json(config: ServeConfig, text: str) -> None:
    """Of version 0.1.0, or damaged: a run goes on without it."""
    folder = born(config, 1)
    (folder.path / ENVIRONMENT).write_text(text)

    with reopened(folder.path, []) as run:
        assert run.checkpoint is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_config_is_one_line_or_still_a_config(config: ServeConfig, damage: str) -> None:
    """It is read or refused with an error of ours; nothing is changed by the attempt."""
    folder = born(config, 1)
    whole = (folder.path / CONFIG).read_bytes()
    DAMAGES[damage](folder.path / CONFIG)

    with suppress(EdgeError), reopened(folder.path, []) as run:
        assert run.checkpoint is not None

    assert folder.load_checkpoint().state["step"] == 1
    if (folder.path / CONFIG).is_dir():
        (folder.path / CONFIG).rmdir()
    (folder.path / CONFIG).write_bytes(whole)
    with reopened(folder.path, []) as run:
        assert run.config == config


class Seen:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def see(self, event: RunEvent) -> None:
        """Keep it."""
        self.events.append(event)


def test_a_damaged_checkpoint_is_told_of_once(config: ServeConfig) -> None:
    """Who takes a run up sees which is damaged, why, where it lies now and which is used."""
    folder, seen = born(config, 1, 2, 3), Seen()
    for path in folder.checkpoints()[1:]:
        (path / "ledger.safetensors").write_bytes(b"")

    with reopened(folder.path, []) as run:
        assert run.checkpoint is not None
        take_up(folder, run.checkpoint, seen)

    reason = "ledger.safetensors has 0 bytes instead of 100"
    assert seen.events == [
        CheckpointDamaged(f"checkpoint-{n:06d}", reason, f"damaged-checkpoint-{n:06d}", used)
        for n in (3, 2)
        for used in ["checkpoint-000001"]
    ]
    assert "\n" not in seen.events[0].text
    with reopened(folder.path, []) as run:
        assert run.checkpoint is not None
        assert not run.checkpoint.damaged
