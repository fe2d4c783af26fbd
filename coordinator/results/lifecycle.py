"""The life of a run, whoever trains: how its folder is made, resumed, and how it ends."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from coordinator.config.run import ServeConfig
from coordinator.results.checkpoint_files import FORMAT, check_format
from coordinator.results.events.event import Watcher
from coordinator.results.events.run import CheckpointDamaged
from coordinator.results.json_text import json_text
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import (
    CONFIG,
    LIVE,
    SAMPLES,
    SOCKET,
    Checkpoint,
    RunFolder,
)
from coordinator.results.run_lock import LOCK, locked
from edge_sdk.config.describe import dump_config
from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.files import storage_errors

# How a run ends: with its result, so that it can go on, or both, as somebody wanted it to.
COMPLETED, PAUSED, STOPPED = "completed", "paused", "stopped"
# What devices are told of a run that has its result.
OVER = "the run is complete"
# What devices are told of a run that was stopped: it ends for them, too.
CUT_SHORT = "the run was stopped by its operator"
ADAPTER = "adapter"
PACKAGES = ("edgesplit", "torch", "transformers", "peft", "pyzmq", "msgpack", "numpy")
ENVIRONMENT = "env.json"
# Folder of what `report_to` writes, and of what it has been told.
TRACKERS = "trackers"
METRICS, TELEMETRY, PLANS, IMPORTANCE, EVENTS = (
    "metrics.jsonl",
    "telemetry.jsonl",
    "plans.jsonl",
    "importance.jsonl",
    "events.jsonl",
)
# What a run that begins anew has to forget, beside its events.
_BEGINNING = (METRICS, TELEMETRY, PLANS, IMPORTANCE, LIVE, SAMPLES, TRACKERS)


class Reopened(NamedTuple):
    """A run that goes on."""

    folder: RunFolder
    config: ServeConfig
    checkpoint: Checkpoint | None
    """Where it goes on; None where it has not come to its first checkpoint: it begins anew."""


@contextmanager
def new_folder(config: ServeConfig) -> Iterator[RunFolder]:
    """Make and hold the folder of a new run; nothing stays of one that fails before it has begun.

    A run of the same name that was killed before its first checkpoint is begun anew.

    Raises:
        ConfigError: a run of that name exists, or another process holds it.
        StorageError: the folder cannot be written.
    """
    folder = _unborn(config) or RunFolder.create(config.runs, config.name)
    with locked(folder.path):
        try:
            _forget_beginning(folder, (*_BEGINNING, EVENTS))
            folder.write_text(CONFIG, dump_config(config))
            folder.write_text(ENVIRONMENT, _environment())
            yield folder
        except BaseException:
            if not folder.has_checkpoint():
                shutil.rmtree(folder.path, ignore_errors=True)
            raise


def require_free_name(config: ServeConfig) -> None:
    """Refuse the name of a run that has begun, before anything takes long.

    Raises:
        ConfigError: a run of that name has come further than its beginning.
    """
    if config.name is not None and _unborn(config) is None:
        RunFolder.require_free(config.runs / config.name)


def _unborn(config: ServeConfig) -> RunFolder | None:
    """Return the folder of that name in which nothing has been trained yet; None without one.

    Raises:
        ConfigError: the run in it is complete.
    """
    path = config.runs / (config.name or "")
    if config.name is None or not path.is_dir():
        return None
    folder = RunFolder(path)
    with storage_errors(f"run folder {path}"):
        names = {entry.name for entry in path.iterdir() if not entry.name.endswith(".tmp")}
    trained = any(row.get("round") for row in folder.rows(METRICS)) or folder.rows(TELEMETRY)
    begun = {CONFIG, ENVIRONMENT, *_BEGINNING, EVENTS, SOCKET, LOCK}
    if names <= begun and not trained:
        return folder if CONFIG in names or names <= {LOCK} else None
    if has_ended(folder):
        raise ConfigError(
            f"run folder {path} exists, and its run is complete: choose another name, or write "
            f"its result once more with `coordinator export {path} --to FOLDER`"
        )
    return None


def has_ended(folder: RunFolder) -> bool:
    """Return whether the run has come to its end, and whoever was there has been told."""
    rows = [row for row in folder.rows(EVENTS) if row.get("event") in ("run.started", "run.ended")]
    return bool(rows) and rows[-1].get("outcome") == COMPLETED


def _forget_beginning(folder: RunFolder, names: tuple[str, ...]) -> None:
    """Remove what an attempt has left that never came to a checkpoint."""
    with storage_errors(f"run folder {folder.path}"):
        for name in names:
            if (path := folder.path / name).is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _environment() -> str:
    """Return versions of what a result depends on, by package; "absent" where it is not here."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    about = {"python": platform.python_version(), "platform": platform.platform(), **versions}
    return json_text({**about, "format": FORMAT}, indent=2)


def read_run(path: Path, overrides: list[str]) -> tuple[RunFolder, ServeConfig]:
    """Return the folder of an existing run, and its config with *overrides*.

    Raises:
        ConfigError: *path* is no run folder, or an override is wrong.
        StorageError: a later version has written it.
    """
    folder = RunFolder.open(path)
    try:
        about = json.loads((path / ENVIRONMENT).read_bytes())
    except (OSError, ValueError):
        about = None  # it was killed before; a run does not need what stands there
    # Its own version wrote no other format: then that number is damaged, and nothing else is.
    if isinstance(about, dict) and about.get("edgesplit") != metadata.version("edgesplit"):
        check_format(path, about.get("format", FORMAT), about.get("edgesplit"))
    return folder, read_config(path, overrides)


def reopen(path: Path, overrides: list[str]) -> tuple[RunFolder, ServeConfig, Checkpoint]:
    """Return the folder of a run, its config with *overrides*, its newest whole checkpoint.

    Raises:
        ConfigError: *path* is no run folder, or an override is wrong.
        StorageError: there is no checkpoint, or it cannot be read.
    """
    folder, config = read_run(path, overrides)
    return folder, config, folder.load_checkpoint()


@contextmanager
def reopened(path: Path, overrides: list[str]) -> Iterator[Reopened]:
    """Hold an existing run, and say where it goes on.

    Raises:
        ConfigError: *path* is no run folder, an override is wrong, or another process holds it.
        StorageError: none of its checkpoints is whole, or it cannot be written.
    """
    folder, config = read_run(path, overrides)
    with locked(path):
        if folder.has_checkpoint():
            yield Reopened(folder, config, folder.load_checkpoint())
            return
        if any(row.get("round") for row in folder.rows(METRICS)):
            raise StorageError(f"{path} holds no checkpoint to resume from")
        _forget_beginning(folder, _BEGINNING)
        folder.write_text(ENVIRONMENT, _environment())
        yield Reopened(folder, config, None)


def take_up(folder: RunFolder, checkpoint: Checkpoint, watcher: Watcher) -> None:
    """Set the checkpoints aside that *checkpoint* stands in for, and say so."""
    used = "" if checkpoint.path is None else checkpoint.path.name
    for damage in checkpoint.damaged:
        aside = folder.set_aside(damage.checkpoint)
        name = damage.checkpoint.name
        watcher.see(CheckpointDamaged(name, damage.reason, aside.name, used))


@contextmanager
def restoring(folder: RunFolder) -> Iterator[None]:
    """Turn what a checkpoint of something else causes into one clear line."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"{folder.path}: its checkpoint does not fit its config: {error}"
        ) from error
