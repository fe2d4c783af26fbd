"""The folder of a run: resolved config, events, metrics, checkpoints.

A checkpoint is written under a temporary name, fsynced and renamed: what carries its final name was
whole then, and its manifest tells whether it still is. It knows no network and no model.

    runs/<name>/
      config.resolved.yaml  env.json
      events.jsonl          what happened when (clock times, joins, losses of devices)
      metrics.jsonl         one line a round; the same bytes for the same seed on one machine
      telemetry.jsonl       one line a round: seconds, bytes, memory
      plans.jsonl           one line whenever something was planned
      test_results.json     what the result does on `evaluation.test_file`
      samples.jsonl         round, prompt, text: what the model says to `evaluation.prompts`
      live.json             where it stands, written anew all the time; nothing depends on it
      checkpoint-000200/    state.json  engine.safetensors  ledger.safetensors  manifest.json
      damaged-checkpoint-*  what was found damaged, set aside
      adapter/              the result, in PEFT's format
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.results.checkpoint_files import (
    STATE,
    DamagedCheckpoint,
    read_files,
    write_files,
)
from coordinator.results.json_text import json_text
from edge_sdk.config.describe import dump_config
from edge_sdk.data.paths import data_files
from edge_sdk.errors import ConfigError, DataError, StorageError
from edge_sdk.files import atomic_write, open_private, storage_errors, sync

CONFIG = "config.resolved.yaml"
# Where a run that goes on says what it does; see standing/live_file.py.
LIVE = "live.json"
# Where a run that goes on listens to its owner; see coordinator/steering.
SOCKET = ".control.sock"
# What was simulated, beside the config of the coordinator; such a run cannot go on later.
SIMULATION = "simulation.yaml"
# How a clock time is written, with its distance from UTC.
CLOCK = "%Y-%m-%dT%H:%M:%S%z"
# What the model says to the prompts of `evaluation.prompts`, a line a prompt and evaluation.
SAMPLES = "samples.jsonl"
# What the model that is the result does on `evaluation.test_file`, as transformers names it.
TEST_RESULTS = "test_results.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.old")


@dataclass(frozen=True)
class Damage:
    """A checkpoint that cannot be used."""

    checkpoint: Path
    reason: str
    """What is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A run as it can be continued."""

    state: dict[str, Any]
    """Round, step, attempt, and who held what; `Run` writes and reads it."""
    arrays: dict[str, dict[str, np.ndarray]]
    """`engine` and `ledger`."""
    path: Path | None = None
    """Where it lies; None where it has not been written."""
    damaged: tuple[Damage, ...] = ()
    """Newer ones that cannot be used, newest first."""


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsynced: set[str] = set()
        """Files with lines that a power cut could still take."""

    @classmethod
    def create(cls, runs: Path, name: str | None) -> RunFolder:
        """Make a new folder below *runs*.

        Raises:
            ConfigError: a run of that name exists.
            StorageError: the folder cannot be written.
        """
        path = runs / name if name else _free(runs / time.strftime("%Y%m%d-%H%M%S"))
        cls.require_free(path)
        with storage_errors(f"run folder {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(0o700)
        return cls(path)

    @staticmethod
    def require_free(path: Path) -> None:
        """Refuse a *path* at which there is something already.

        Raises:
            ConfigError: there is.
        """
        if path.exists():
            raise ConfigError(
                f"run folder {path} exists; choose another name, or `coordinator resume {path}`"
            )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run."""
        if not (path / CONFIG).is_file():
            raise ConfigError(
                f"{path} is no run folder: it has no {CONFIG}; begin a run with `coordinator serve`"
            )
        return cls(path)

    @property
    def name(self) -> str:
        """The run's id."""
        return self.path.name

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run, whole or not at all."""
        atomic_write(self.path / name, text)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a line to a .jsonl file."""
        with storage_errors(self.path / name), open_private(self.path / name, "ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")  # a crash has cut the last line off
            file.write(json_text(row).encode() + b"\n")
        self._unsynced.add(name)

    def settle(self) -> None:
        """Make sure that all lines written so far survive a power cut."""
        for name in sorted(self._unsynced.copy()):
            self._unsynced.discard(name)  # before: another thread may add a line meanwhile
            with storage_errors(self.path / name):
                sync(self.path / name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read a .jsonl file; a line that was cut off by a crash is left out."""
        path = self.path / name
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        return [row for line in lines if (row := _row(line)) is not None]

    def drop_rows_from(self, name: str, round_: int) -> None:
        """Forget the lines of rounds that will be run again."""
        rows = [row for row in self.rows(name) if row.get("round", -1) < round_]
        if (self.path / name).is_file():
            self.write_text(name, "".join(json_text(row) + "\n" for row in rows))

    # ---- checkpoints ----

    def save_checkpoint(
        self, step: int, checkpoint: Checkpoint, keep: int, spared: Collection[int] = ()
    ) -> Path:
        """Write a checkpoint and remove all but the newest *keep*, and those of steps in *spared*.

        Lines written before it are as durable as the checkpoint that makes them final.
        """
        final = self.path / f"checkpoint-{step:06d}"
        temporary = self.path / f".{final.name}.tmp"
        self.settle()
        with storage_errors(f"checkpoint {final}"):
            for left in self.path.glob(".checkpoint-*.tmp"):  # a killed process was writing it
                shutil.rmtree(left)
            temporary.mkdir(0o700)
            write_files(temporary, step, checkpoint.state, checkpoint.arrays)
            aside = self.path / f".{final.name}.old"
            if final.exists():  # the same step again: one of both is there at every moment
                shutil.rmtree(aside, ignore_errors=True)
                final.replace(aside)
            temporary.replace(final)
            sync(self.path)
            kept = {f"checkpoint-{each:06d}" for each in spared}
            others = [path for path in self.checkpoints()[:-keep] if path.name not in kept]
            for old in {*self.path.glob(".checkpoint-*.old"), *others}:
                self._remove(old)
            for gone in self.path.glob(".checkpoint-*.gone"):  # a killed process was at it
                shutil.rmtree(gone)
        return final

    def _remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint, under another name first: half of one must not look like one."""
        gone = self.path / f"{_hidden(checkpoint)}.gone"
        if gone.exists():
            shutil.rmtree(gone)
        checkpoint.replace(gone)
        shutil.rmtree(gone)

    def checkpoints(self) -> list[Path]:
        """Return checkpoints, oldest first; whether they are whole shows when they are read."""
        found: dict[int, Path] = {}
        for step, path in self._candidates():
            if (path / STATE).is_file():
                found[step] = path
        return [found[step] for step in sorted(found)]

    def _candidates(self) -> list[tuple[int, Path]]:
        """Return what carries the name of a checkpoint, oldest first, with its step."""
        found = []
        with storage_errors(f"run folder {self.path}"):
            for path in self.path.iterdir():
                if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir():
                    found.append((int(match[1] or match[2]), not path.name.startswith("."), path))
        return [(step, path) for step, _, path in sorted(found)]

    def load_checkpoint(self) -> Checkpoint:
        """Read the newest checkpoint that is whole; it names those that are newer and are not.

        Raises:
            StorageError: there is none, or it cannot be read.
        """
        damaged: list[Damage] = []
        for step, path in reversed(self._candidates()):
            before = _identity(path)
            try:
                state, arrays = read_files(path, step)
            except DamagedCheckpoint as error:
                if _identity(path) != before:  # whoever holds the run has just put another there
                    return self.load_checkpoint()
                damaged.append(Damage(path, str(error)))
                continue
            return Checkpoint(state, arrays, path, tuple(damaged))
        if not damaged:
            raise StorageError(f"{self.path} holds no checkpoint to resume from")
        found = "; ".join(f"{d.checkpoint.name} cannot be read: {d.reason}" for d in damaged)
        raise StorageError(f"{self.path} holds no checkpoint that is whole: {found}")

    def checkpoint_of(self, round_: int, steps_per_round: int) -> Checkpoint:
        """Read a checkpoint of a moment when just so many rounds were done.

        Raises:
            ConfigError: there is none; the message names those that are there.
            StorageError: it cannot be read.
        """
        by_round: dict[int, tuple[int, Path]] = {}
        for step, path in self._candidates():
            by_round.setdefault(step // steps_per_round, (step, path))
        if round_ not in by_round:
            kept = ", ".join(map(str, sorted(by_round))) or "none"
            raise ConfigError(
                f"{self.path}: no checkpoint is left of when {round_} rounds were done, but of: "
                f"{kept}; `save_total_limit` says how many are kept"
            )
        step, path = by_round[round_]
        return Checkpoint(*read_files(path, step), path)

    def has_checkpoint(self) -> bool:
        """Return whether there is anything like a checkpoint, be it damaged."""
        return bool(self._candidates())

    def damages(self) -> list[Damage]:
        """Return what is wrong with each checkpoint that cannot be used, oldest first."""
        found = []
        for step, path in self._candidates():
            before = _identity(path)
            try:
                read_files(path, step)
            except StorageError as error:
                if _identity(path) == before:
                    found.append(Damage(path, str(error)))
        return found

    def set_aside(self, checkpoint: Path) -> Path:
        """Take a damaged checkpoint out of the way; return where it lies from now on."""
        aside = _free(self.path / f"damaged-{_hidden(checkpoint)[1:]}")
        with storage_errors(aside):
            checkpoint.replace(aside)
            sync(self.path)
        return aside


def _identity(folder: Path) -> int | None:
    """Return what tells a folder from another one that gets its name; None without one."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _hidden(checkpoint: Path) -> str:
    """Return the name of a checkpoint with a point before it, whatever state it is in."""
    return "." + checkpoint.name.removeprefix(".").removesuffix(".old")


def _free(path: Path) -> Path:
    """Return *path*, or the first with a number behind it that is not there yet."""
    numbered: Iterator[Path] = (path.with_name(f"{path.name}-{n}") for n in count(2))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line; None for what a crash or a power cut has left of one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def digest_of(config: object, data: Iterable[str | Sequence[str] | None]) -> str:
    """Return 12 letters that are equal for equal configs and equal bytes of *data*.

    Args:
        config: A dataclass, as `dump_config` takes it.
        data: Files, patterns, folders; ids of data sets and None stand for nothing.
    """
    found = hashlib.sha256(dump_config(config).encode())
    for source in data:
        for path in _present(source):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _present(source: str | Sequence[str] | None) -> list[Path]:
    """Return the files that *source* means and that are there."""
    try:
        return [] if source is None else [p for p in data_files(source) if p.is_file()]
    except DataError:  # said by whoever reads them
        return []
