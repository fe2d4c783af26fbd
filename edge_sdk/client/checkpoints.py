"""A device's own checkpoints: adapters and optimizer moments at the start of its last rounds.

They never leave the device. Each is one safetensors file that carries its own hash, its step and
its plan: one that is not whole, or not what its name says, counts as not held. Knows no network
and no runtime.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from edge_sdk.errors import StorageError, one_line
from edge_sdk.files import PRIVATE, atomic_write, is_damage, make_private, storage_errors
from edge_sdk.protocol.tensors import Shape

log = logging.getLogger(__name__)

# The round that runs, and the one before it: the coordinator may have died between the two.
KEPT = 2
# Format of these files. Version 0.1.0 wrote format 1, without any of these facts; it is still read.
FORMAT = 2
_HASH = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_HASH = "0" * 64


class UnusableCheckpoint(StorageError):
    """A checkpoint is damaged, or belongs to something else."""


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
            for folder in (self.folder.parent, self.folder):  # of the run, and of the device in it
                make_private(folder)
            (self.folder / ".writable").touch(PRIVATE)
            for left in self.folder.glob("*.tmp"):  # a killed process was writing it
                left.unlink(missing_ok=True)

    def steps(self) -> tuple[int, ...]:
        """Return the steps of which there is a whole checkpoint under this plan, oldest first.

        Each is read and checked now; one that cannot be used is set aside and named in the log.
        """
        own = [step for step, path in self._all() if path == self._path(step)]
        return tuple(step for step in own if self._try_read(self._path(step), step) is not None)

    def _all(self) -> list[tuple[int, Path]]:
        """Return the checkpoints of all plans, oldest first."""
        found = []
        for path in self.folder.glob("step-*.safetensors"):
            step = path.stem.split("-")[1]
            if step.isdecimal():
                found.append((int(step), path))
        return sorted(found)

    def save(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Write a checkpoint, whole or not at all, and forget old ones.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        self._write(self._path(step), step, arrays)
        with storage_errors(f"checkpoint {self.folder}"):
            for _, old in self._all()[:-KEPT]:
                old.unlink(missing_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop checkpoints of later steps: the run has gone back, and comes there anew.

        Raises:
            StorageError: the folder cannot be written.
        """
        with storage_errors(f"checkpoint {self.folder}"):
            for later, path in self._all():
                if later > step:
                    path.unlink(missing_ok=True)

    def load(self, step: int) -> dict[str, np.ndarray]:
        """Read the checkpoint of *step*.

        Raises:
            StorageError: there is none, or it cannot be read.
        """
        return self._read(self._path(step), step)

    def try_load(self, step: int, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray] | None:
        """Read the checkpoint of *step*; None where it cannot be used, and then it is set aside.

        Args:
            step: Which one.
            shapes: Arrays that it must hold, as the plan in force has them.
        """
        path = self._path(step)
        arrays = self._try_read(path, step)
        if arrays is None:
            return None
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape:
                self._set_aside(path, f"{path}: {name} is not of this plan")
                return None
        return arrays

    def save_moments(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep the optimizer moments after a round's last step, before it is aggregated.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        if arrays:
            self._write(self._end_path(step), step, arrays)
            with storage_errors(f"checkpoint {self.folder}"):
                for old in self.folder.glob("end-*.safetensors"):
                    if old != self._end_path(step):
                        old.unlink(missing_ok=True)

    def moments(self, step: int) -> dict[str, np.ndarray]:
        """Return the optimizer moments as they were left by *step*; empty without any.

        That is at the end of the last round that the device was in, or at the start of one that it
        has not come to the end of.
        """
        left = [(held, 1, path) for held, path in self._all()]
        for path in self.folder.glob("end-*.safetensors"):
            end = path.stem.split("-")[1]
            if end.isdecimal() and int(end) <= step:
                left.append((int(end), 2 if int(end) == step else 0, path))
        for held, _, path in sorted(left, reverse=True):
            found = self._try_read(path, held)
            if found is not None:
                return found
        return {}

    def _write(self, path: Path, step: int, arrays: dict[str, np.ndarray]) -> None:
        atomic_write(path, _sealed(arrays, self._facts(path, step)), what="checkpoint")

    def _facts(self, path: Path, step: int) -> dict[str, str]:
        """Return what a file says of itself: whose it is, of which step, and under which plan."""
        owner = f"{self.folder.parent.name}/{self.folder.name}"
        _, _, plan = path.stem.partition(f"{step:06d}-")
        return {"owner": owner, "step": str(step), "plan": plan}

    def _read(self, path: Path, step: int) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = path.read_bytes()
            is_sealed = _check(data, self._facts(path, step))
            arrays: dict[str, np.ndarray] = load(data)
            if not is_sealed:
                _check_finite(arrays)
        except OSError as error:
            kind = UnusableCheckpoint if is_damage(error) else StorageError
            raise kind(f"cannot read checkpoint {path}: {error.strerror}") from error
        except (ValueError, KeyError, SafetensorError) as error:
            reason = one_line(error)
            raise UnusableCheckpoint(f"cannot read checkpoint {path}: {reason}") from error
        return arrays

    def _try_read(self, path: Path, step: int) -> dict[str, np.ndarray] | None:
        """Return a checkpoint; None where it cannot be used, and then it is set aside."""
        try:
            return self._read(path, step)
        except UnusableCheckpoint as error:
            self._set_aside(path, str(error))
        except StorageError as error:  # what cannot be opened now may be whole all the same
            log.warning("checkpoint.unread reason=%s", error)
        return None

    def _set_aside(self, path: Path, reason: str) -> None:
        log.warning("checkpoint.damaged reason=%s; it counts as not held", reason)
        with suppress(OSError):
            path.replace(path.with_name(f"damaged-{path.name}"))

    def _path(self, step: int) -> Path:
        plan = f"-{self.plan}" if self.plan else ""
        return self.folder / f"step-{step:06d}{plan}.safetensors"

    def _end_path(self, step: int) -> Path:
        return self.folder / f"end-{step:06d}.safetensors"


def _sealed(arrays: dict[str, np.ndarray], facts: dict[str, str]) -> bytearray:
    """Return a safetensors file that carries *facts* and the SHA-256 of all its other bytes."""
    from safetensors.numpy import save

    plain = {name: np.array(array, order="C") for name, array in arrays.items()}
    about = {**facts, "checkpoint_format": str(FORMAT), "sha256": _NO_HASH}
    data = bytearray(save(plain, metadata=about))
    place = _HASH.search(data)
    assert place is not None
    data[place.start(1) : place.end(1)] = hashlib.sha256(data).hexdigest().encode()
    return data


def _check(data: bytes, facts: dict[str, str]) -> bool:
    """Refuse a file of which a bit has changed, or whose *facts* are others.

    Returns:
        Whether it carries a hash; those of version 0.1.0 do not.

    Raises:
        ValueError: why it cannot be used.
    """
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if not 0 < length == len(header):
        raise ValueError("it is cut off")
    about = json.loads(header).get("__metadata__") or {}
    if "checkpoint_format" not in about and "sha256" not in about:
        return False
    found = _HASH.search(header)
    if found is None or not _is_whole(data, 8 + found.start(1)):
        raise ValueError("its bytes are not those that were written")
    if about["checkpoint_format"] != str(FORMAT):
        raise ValueError(f"format {about['checkpoint_format']}, this version reads {FORMAT}")
    for name, expected in facts.items():
        if about[name] != expected:
            raise ValueError(f"its {name} is {about[name]}, not {expected}")
    return True


def _check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse what was hardly saved so; without a hash, damage shows in nothing else."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")


def _is_whole(data: bytes, place: int) -> bool:
    """Return whether the hash at *place* is that of the file without it."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:place])
    digest.update(_NO_HASH.encode())
    digest.update(view[place + len(_NO_HASH) :])
    return digest.hexdigest().encode() == view[place : place + len(_NO_HASH)]
