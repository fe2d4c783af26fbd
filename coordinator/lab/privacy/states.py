"""Hidden states of texts after ever more blocks, and as a coordinator reads them off the wire.

Legend: B sequences, T positions, D hidden size, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coordinator.lab.privacy.texts import Texts
from edge_sdk.data.batches import MicroBatch
from edge_sdk.held_states import HeldStates
from edge_sdk.model.partition import Slice
from edge_sdk.protocol import codecs, residual
from edge_sdk.protocol.roomy import RoomyCodec

Array = npt.NDArray[np.float32]

# What both sides hold of a sample for `residual`, at most.
HELD_BYTES = 2**30


class Walk:
    """The hidden states of some texts, taken from one split point to the next."""

    def __init__(self, model: Slice, batches: Sequence[MicroBatch]) -> None:
        """Begin with what enters the first block."""
        self._model, self._batches = model, batches
        self.split = 0
        """Blocks that have run."""
        with torch.no_grad():
            self.states = [model.front(*_inputs(batch), 0).float().numpy() for batch in batches]
        """What comes after them, (B, T, D) for each batch."""

    def to(self, split: int) -> None:
        """Run the blocks up to *split*."""
        if split == self.split:
            return
        with torch.no_grad():
            for index, batch in enumerate(self._batches):
                ids_BT, lengths_B = _inputs(batch)
                hidden_BTD = torch.from_numpy(self.states[index])
                after = self._model.middle(hidden_BTD, lengths_B, self.split, split, ids_BT)
                self.states[index] = after.float().numpy()
        self.split = split


def _inputs(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths)


def as_received(states: Sequence[Array], batches: Sequence[MicroBatch], codec: str) -> list[Array]:
    """Return what the other side makes of hidden states, batch by batch.

    With `residual` that is what it holds after two epochs in which nothing was learned.
    """
    if codec != residual.RESIDUAL:
        return [as_read(array, codec) for array in states]
    ours, theirs = HeldStates(HELD_BYTES), HeldStates(HELD_BYTES)
    found: list[Array] = []
    for epoch in range(2):
        ours.begin_step(epoch)
        found, first = [], 0
        for array_BTD, batch in zip(states, batches, strict=True):
            samples = range(first, first + len(batch.lengths))
            first += len(batch.lengths)
            coded = residual.code(array_BTD, batch.lengths.tolist(), samples, ours)
            tensors: dict[str, Any] = {n: codecs.as_read(*t) for n, t in coded.tensors.items()}
            tensors["lengths"] = batch.lengths
            got = residual.read(tensors, samples, coded.starts, theirs)
            assert got is not None, "both sides hold the same"
            found.append(got)
    return found


def as_read(array: Array, codec: str) -> Array:
    """Return what a reader makes of one tensor that is sent whole."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    found: Array = codecs.as_read(array, RoomyCodec().choose(codec, array, "hidden states"))
    return found


def windows(states: Sequence[Array], texts: Texts) -> Array:
    """Return each token's state between those of its neighbours, (N, 3 D); zeros where none is."""
    rows = []
    for array_BTD, batch in zip(states, texts.batches, strict=True):
        is_real_BT1 = (np.arange(array_BTD.shape[1]) < batch.lengths[:, None])[..., None]
        clean_BTD = array_BTD * is_real_BT1
        none_B1D = np.zeros_like(clean_BTD[:, :1])
        before = np.concatenate([none_B1D, clean_BTD[:, :-1]], axis=1)
        behind = np.concatenate([clean_BTD[:, 1:], none_B1D], axis=1)
        rows.append(np.concatenate([before, clean_BTD, behind], axis=2))
    found: Array = texts.flat(rows)
    return found


def error_of(states: Sequence[Array], received: Sequence[Array], texts: Texts) -> float:
    """Return the root mean square distance by which a codec moves the state of a token."""
    moved_ND = texts.flat(received) - texts.flat(states)
    return float(np.sqrt(np.mean(np.sum(moved_ND**2, axis=1))))
