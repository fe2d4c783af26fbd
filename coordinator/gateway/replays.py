"""What devices with frozen blocks have sent of their samples, in files, so that it is sent once.

A file for each device, to which states are added until the device's blocks change or there is no
more room; it goes with the run. What both sides count with stands in `edge_sdk/protocol/replay.py`.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError, StorageError
from edge_sdk.files import make_folder, storage_errors
from edge_sdk.lora.factors import Array
from edge_sdk.names import inside
from edge_sdk.protocol import codecs
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import Activation, RoundStart
from edge_sdk.protocol.plan import Plan
from edge_sdk.protocol.replay import Unchanged, check_rows, joined, sent_rows

log = logging.getLogger(__name__)

# How a state is written that came as it is here, the smallest first that loses nothing of it.
EXACT = ("bfloat16", "float16", "float32")
DIGEST_BYTES = 8


class _Place(NamedTuple):
    """Where a sample's state lies in a file."""

    offset: int
    codec: str
    shape: tuple[int, int]
    digest: bytes


class StateFile:
    """States of one device's samples."""

    def __init__(self, path: Path, dtype: str) -> None:
        """Begin an empty file at *path*; *dtype* is one of `ReplayConfig.dtype`."""
        self._path, self._dtype = path, dtype
        self._places: dict[int, _Place] = {}
        self.num_bytes = 0
        with storage_errors(path):
            make_folder(path.parent)
            open(path, "wb", opener=partial(os.open, mode=0o600)).close()

    def __contains__(self, sample: int) -> bool:
        return sample in self._places

    def put(self, sample: int, state_TD: Array) -> None:
        """Keep a sample's state; it takes the place of an older one.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        codec = self._codec(state_TD)
        data = codecs.encode(np.ascontiguousarray(state_TD), codec)
        digest = hashlib.blake2b(data.data, digest_size=DIGEST_BYTES).digest()
        with storage_errors(self._path), self._path.open("r+b") as file:
            file.seek(self.num_bytes)
            file.write(data.data)
        rows, width = state_TD.shape
        self._places[sample] = _Place(self.num_bytes, codec, (rows, width), digest)
        self.num_bytes += data.nbytes

    def get(self, sample: int) -> Array:
        """Return the state (T, D) of a sample that is kept.

        Raises:
            LocalProtocolError: it is damaged.
        """
        place = self._places[sample]
        size = codecs.encoded_bytes(place.codec, place.shape)
        try:
            with self._path.open("rb") as file:
                file.seek(place.offset)
                data = file.read(size)
        except OSError as error:
            raise LocalProtocolError(f"{self._path} cannot be read: {error.strerror}") from error
        if hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() != place.digest:
            raise LocalProtocolError(f"{self._path}: the state of sample {sample} is damaged")
        return codecs.decode(data, place.codec, place.shape)

    def clear(self) -> None:
        """Keep nothing any more, here and on disk."""
        self._places, self.num_bytes = {}, 0
        with storage_errors(self._path):
            self._path.unlink(missing_ok=True)

    def _codec(self, state_TD: Array) -> str:
        if self._dtype != "wire":
            is_possible = np.isfinite(codecs.as_read(state_TD, self._dtype)).all()
            return self._dtype if is_possible else "float32"
        return next(
            name for name in EXACT if np.array_equal(codecs.as_read(state_TD, name), state_TD)
        )


class Replays:
    """The files of all devices of a run, and what still holds of them."""

    def __init__(
        self, folder: Path | None = None, max_bytes: float = 0.0, dtype: str = "wire"
    ) -> None:
        """Keep states in *folder*; None keeps nothing.

        Args:
            folder: A folder of this run alone; what an earlier process has left there goes.
            max_bytes: Most bytes of all files together.
            dtype: One of `ReplayConfig.dtype`.
        """
        self._folder, self._max_bytes, self._dtype = folder, max_bytes, dtype
        self._files: dict[str, StateFile] = {}
        self._unchanged: dict[str, Unchanged] = {}
        self._replayed = 0
        self._last: dict[str, int] = {}
        """The last step in which a state of a device came from its file."""
        self._kept: set[tuple[str, int, int]] = set()
        """Micro-batches of which every state is kept and whose device has not been told."""
        self.close()

    def close(self) -> None:
        """Delete everything that is kept."""
        for file in self._files.values():
            file.clear()
        self._files, self._kept = {}, set()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # ---- when it holds ----

    def begin(self, start: RoundStart, tensors: Iterable[str]) -> None:
        """Take in what a device is told at the start of a round."""
        device = start.stamp.device
        if not self._unchanged.setdefault(device, Unchanged()).begin(start, tensors):
            self._drop(device)

    def forget(self, device: str) -> None:
        """Drop what is kept of a device that begins anew or is gone."""
        if device in self._unchanged:
            self._unchanged[device].forget()
        self._drop(device)

    def _drop(self, device: str) -> None:
        self._kept = {kept for kept in self._kept if kept[0] != device}
        if device in self._files:
            self._files.pop(device).clear()

    # ---- what is kept ----

    def whole(self, device: str, envelope: Envelope) -> Envelope:
        """Return an Activation with the states of all its sequences.

        Raises:
            RemoteProtocolError: its rows do not add up, or one of them is not kept here.
            LocalProtocolError: what is kept is damaged; the device has to begin anew.
        """
        message: Activation = envelope.message
        if not message.replays:
            return envelope
        tensors, file = envelope.tensors, self._files.get(device)
        lengths_B, rows = tensors["lengths"], len(tensors["lengths"])
        came = tensors.get("hidden", np.zeros((0, 0, 0), np.float32))
        check_rows(message.samples, message.replays, rows, len(came))
        states: dict[int, Array] = {}
        for row in message.replays:
            if file is None or message.samples[row] not in file:
                raise RemoteProtocolError(f"sample {message.samples[row]} is not kept here")
            states[row] = file.get(message.samples[row])
            if len(states[row]) != lengths_B[row]:
                raise RemoteProtocolError(
                    f"sample {message.samples[row]}: {lengths_B[row]} positions, kept are "
                    f"{len(states[row])}"
                )
        longest, width = int(lengths_B.max()), states[message.replays[0]].shape[1]
        if len(came) and came.shape[1:] != (longest, width):
            raise RemoteProtocolError(f"hidden of shape {came.shape}, due: (C, {longest}, {width})")
        states |= dict(zip(sent_rows(message.replays, rows), came, strict=True))
        hidden_BTD = joined(states, rows, longest, width)
        self._replayed += len(message.replays)
        self._last[device] = message.stamp.step
        return replace(envelope, tensors={**tensors, "hidden": hidden_BTD})

    def keep(
        self, device: str, message: Activation, tensors: Mapping[str, Array], plan: Plan
    ) -> None:
        """Keep the states that came with a checked Activation, if there is room for all of them.

        Args:
            device: Who sent it.
            message: The Activation; without `samples` nothing is kept.
            tensors: Its tensors, the states of all sequences among them.
            plan: What the device runs.

        Raises:
            RemoteProtocolError: its rows do not add up.
        """
        if self._folder is None or not message.samples or not plan.is_forward_only:
            return
        lengths_B, hidden_BTD = tensors["lengths"], tensors["hidden"]
        rows = sent_rows(message.replays, len(lengths_B))
        check_rows(message.samples, message.replays, len(lengths_B), len(rows))
        if not rows:
            return
        width = hidden_BTD.shape[2]
        most = sum(4 * int(lengths_B[row]) * width for row in rows)
        used = sum(file.num_bytes for file in self._files.values())
        if used + most > self._max_bytes:
            return
        try:
            if device not in self._files:
                self._files[device] = StateFile(
                    inside(self._folder, f"{device}.states"), self._dtype
                )
            for row in rows:
                self._files[device].put(message.samples[row], hidden_BTD[row, : lengths_B[row]])
        except StorageError as error:  # the run needs none of it
            log.warning("replay.full reason=%s; no more states are kept", error)
            self._max_bytes = 0.0
            return
        self._kept.add((device, message.stamp.step, message.micro))

    def has_replayed(self, device: str, step: int) -> bool:
        """Return whether a device has not computed all of its step."""
        return self._last.get(device) == step

    def take_replayed(self) -> int:
        """Return how many states have been taken from files since the last call."""
        replayed, self._replayed = self._replayed, 0
        return replayed

    def take_kept(self, device: str, step: int, micro: int) -> bool:
        """Return whether all that came with a micro-batch is kept; said once."""
        found = (device, step, micro) in self._kept
        self._kept.discard((device, step, micro))
        return found
