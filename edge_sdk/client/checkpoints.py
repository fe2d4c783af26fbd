"""A device's own checkpoints: adapters and optimizer moments at the start of its last rounds.

They never leave the device. Knows no network and no runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_sdk.errors import StorageError
from edge_sdk.files import atomic_write, storage_errors

# The round that runs, and the one before it: the coordinator may have died between the two.
KEPT = 2


class LocalState:
    """Checkpoints of one device in one run, by step."""

    def __init__(self, folder: Path, plan: str = "") -> None:
        self.folder = folder
        self.plan = plan
        """Name of the plan in force: another plan's checkpoints fit no adapter of this one."""

    def prepare(self) -> None:
        """Make the folder now, rather than find out at the first checkpoint that it cannot be.

        Raises:
            StorageError: the folder cannot be written.
        """
        with storage_errors(f"checkpoint {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".writable").touch()
            for left in self.folder.glob("*.tmp"):  # a killed process was writing it
                left.unlink(missing_ok=True)

    def steps(self) -> tuple[int, ...]:
        """Return the steps of which there is a checkpoint under this plan, oldest first."""
        return tuple(step for step, path in self._all() if path == self._path(step))

    def _all(self) -> list[tuple[int, Path]]:
        """Return the checkpoints of all plans, oldest first."""
        paths = self.folder.glob("step-*.safetensors")
        return sorted((int(p.stem.split("-")[1]), p) for p in paths)

    def save(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Write a checkpoint, whole or not at all, and forget old ones.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        self._write(self._path(step), arrays)
        with storage_errors(f"checkpoint {self.folder}"):
            for _, old in self._all()[:-KEPT]:
                old.unlink(missing_ok=True)

    def load(self, step: int) -> dict[str, np.ndarray]:
        """Read the checkpoint of *step*.

        Raises:
            StorageError: there is none, or it cannot be read.
        """
        return _read(self._path(step))

    def save_moments(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep the optimizer moments after a round's last step, before it is aggregated."""
        if arrays:
            self._write(self._end_path(step), arrays)
            for old in self.folder.glob("end-*.safetensors"):
                if old != self._end_path(step):
                    old.unlink(missing_ok=True)

    def moments(self, step: int) -> dict[str, np.ndarray]:
        """Return the optimizer moments at *step*, or the newest there are; empty without any."""
        if self._end_path(step).is_file():
            return _read(self._end_path(step))
        held = self._all()
        return _read(held[-1][1]) if held else {}

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save

        data = save({k: np.array(a, order="C") for k, a in arrays.items()})
        atomic_write(path, data, what="checkpoint")

    def _path(self, step: int) -> Path:
        plan = f"-{self.plan}" if self.plan else ""
        return self.folder / f"step-{step:06d}{plan}.safetensors"

    def _end_path(self, step: int) -> Path:
        return self.folder / f"end-{step:06d}.safetensors"


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read checkpoint {path}: {error}") from error
    return arrays
