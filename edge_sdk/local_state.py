"""A device's own checkpoints: adapters and optimizer moments at the start of its last rounds.

They never leave the device. Knows no network and no runtime.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from edge_sdk.errors import StorageError

# The round that runs, and the one before it: the coordinator may have died between the two.
KEPT = 2


class LocalState:
    """Checkpoints of one device in one run, by step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> tuple[int, ...]:
        """Steps of which there is a checkpoint, oldest first."""
        found = self.folder.glob("step-*.safetensors")
        return tuple(sorted(int(p.stem.removeprefix("step-")) for p in found))

    def save(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Write a checkpoint, whole or not at all, and forget old ones.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        from safetensors.numpy import save

        path = self._path(step)
        temporary = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(save({k: np.ascontiguousarray(a) for k, a in arrays.items()}))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            for old in self.steps()[:-KEPT]:
                self._path(old).unlink()
        except OSError as error:
            raise StorageError(f"cannot write checkpoint {path}: {error.strerror}") from error

    def load(self, step: int) -> dict[str, np.ndarray]:
        """Read the checkpoint of *step*.

        Raises:
            StorageError: there is none, or it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays: dict[str, np.ndarray] = load_file(self._path(step))
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot read checkpoint {self._path(step)}: {error}") from error
        return arrays

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"
