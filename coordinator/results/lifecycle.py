"""The life of a run, whoever trains: how its folder is made, resumed, and how it ends."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.results.run_folder import CONFIG, Checkpoint, RunFolder
from edge_sdk.config.describe import dump_config
from edge_sdk.config.loader import load_config
from edge_sdk.errors import StorageError

# How a run ends: with its result, or so that it can go on.
COMPLETED, PAUSED = "completed", "paused"
ADAPTER = "adapter"
PACKAGES = ("edgesplit", "torch", "transformers", "peft", "pyzmq", "msgpack", "numpy")


@contextmanager
def new_folder(config: ServeConfig) -> Iterator[RunFolder]:
    """Make the folder of a new run; nothing stays of one that fails before its first checkpoint.

    Raises:
        ConfigError: a run of that name exists.
        StorageError: the folder cannot be written.
    """
    folder = RunFolder.create(config.runs, config.name)
    try:
        folder.write_text(CONFIG, dump_config(config))
        folder.write_text("env.json", json.dumps(_environment(), indent=2))
        yield folder
    except BaseException:
        if not folder.checkpoints():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _environment() -> dict[str, str]:
    """Return versions of what a result depends on, by package; "absent" where it is not here."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {"python": platform.python_version(), "platform": platform.platform(), **versions}


def reopen(path: Path, overrides: list[str]) -> tuple[RunFolder, ServeConfig, Checkpoint]:
    """Return the folder of an existing run, its config with *overrides*, its newest checkpoint.

    Raises:
        ConfigError: *path* is no run folder, or an override is wrong.
        StorageError: there is no checkpoint, or it cannot be read.
    """
    folder = RunFolder.open(path)
    config = load_config(ServeConfig, path / CONFIG, overrides, env={})
    return folder, config, folder.load_checkpoint()


@contextmanager
def restoring(folder: RunFolder) -> Iterator[None]:
    """Turn what a checkpoint of something else causes into one clear line."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"{folder.path}: its checkpoint does not fit its config: {error}"
        ) from error
