"""The folder of a run: resolved config, events, metrics, checkpoints.

A checkpoint is written under a temporary name, fsynced and renamed: what carries its final name is
whole. It knows no network and no model.

    runs/<name>/
      config.resolved.yaml  env.json
      events.jsonl          what happened when (clock times, joins, losses of devices)
      metrics.jsonl         one line a round; the same bytes for the same seed on one machine
      telemetry.jsonl       one line a round: seconds, bytes, memory
      checkpoint-000200/    state.json  engine.safetensors  ledger.safetensors
      adapter/              the result, in PEFT's format
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.config.describe import dump_config
from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.files import atomic_write, storage_errors, sync

CONFIG = "config.resolved.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A run as it can be continued."""

    state: dict[str, Any]
    """Round, step, attempt, and who held what; `Run` writes and reads it."""
    arrays: dict[str, dict[str, np.ndarray]]
    """`engine` and `ledger`."""


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, runs: Path, name: str | None) -> RunFolder:
        """Make a new folder below *runs*.

        Raises:
            ConfigError: a run of that name exists.
            StorageError: the folder cannot be written.
        """
        name = name or time.strftime("%Y%m%d-%H%M%S")
        path = runs / name
        if path.exists():
            raise ConfigError(
                f"run folder {path} exists; choose another name, or `coordinator resume {path}`"
            )
        with storage_errors(f"run folder {path}"):
            path.mkdir(parents=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run."""
        if not (path / CONFIG).is_file():
            raise ConfigError(f"{path} is no run folder: it has no {CONFIG}")
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
        with storage_errors(self.path / name), (self.path / name).open("ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")  # a crash has cut the last line off
            file.write(json.dumps(row, sort_keys=True).encode() + b"\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read a .jsonl file; a line that was cut off by a crash is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def drop_rows_from(self, name: str, round_: int) -> None:
        """Forget the lines of rounds that will be run again."""
        rows = [row for row in self.rows(name) if row.get("round", -1) < round_]
        if (self.path / name).is_file():
            self.write_text(name, "".join(json.dumps(r, sort_keys=True) + "\n" for r in rows))

    def save_checkpoint(self, step: int, checkpoint: Checkpoint, keep: int) -> Path:
        """Write a checkpoint and remove all but the newest *keep*."""
        from safetensors.numpy import save

        final = self.path / f"checkpoint-{step:06d}"
        temporary = self.path / f".{final.name}.tmp"
        with storage_errors(f"checkpoint {final}"):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, arrays in checkpoint.arrays.items():
                data = save({key: np.asarray(a, order="C") for key, a in arrays.items()})
                (temporary / f"{name}.safetensors").write_bytes(data)
            state = json.dumps(checkpoint.state, indent=2, sort_keys=True)
            (temporary / "state.json").write_text(state)
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            aside = self.path / f".{final.name}.old"
            if final.exists():  # the same step again: one of both is there at every moment
                shutil.rmtree(aside, ignore_errors=True)
                final.replace(aside)
            temporary.replace(final)
            sync(self.path)
            for done in self.path.glob(".checkpoint-*.old"):
                shutil.rmtree(done)
            for old in self.checkpoints()[:-keep]:
                shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = {_step(p): p for p in self.path.glob(".checkpoint-*.old")}
        found |= {_step(p): p for p in self.path.glob("checkpoint-*")}
        return [found[step] for step in sorted(found) if (found[step] / "state.json").is_file()]

    def load_checkpoint(self) -> Checkpoint:
        """Read the newest checkpoint.

        Raises:
            StorageError: there is none, or it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        found = self.checkpoints()
        if not found:
            raise StorageError(f"{self.path} holds no checkpoint to resume from")
        newest = found[-1]
        try:
            state = json.loads((newest / "state.json").read_text())
            arrays = {f.stem: load_file(f) for f in sorted(newest.glob("*.safetensors"))}
        except (OSError, ValueError, SafetensorError) as error:
            raise StorageError(f"checkpoint {newest} cannot be read: {error}") from error
        return Checkpoint(state, arrays)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(".").removesuffix(".old").removeprefix("checkpoint-"))


def digest_of(config: object, data: Iterable[str | None]) -> str:
    """Return 12 letters that are equal for equal configs and equal bytes of *data*.

    Args:
        config: A dataclass, as `dump_config` takes it.
        data: Files; ids of data sets and None stand for nothing.
    """
    found = hashlib.sha256(dump_config(config).encode())
    for path in data:
        if path is not None and Path(path).is_file():  # not the id of a data set
            found.update(Path(path).read_bytes())
    return found.hexdigest()[:12]
