"""Inversion without training: the token of the vocabulary whose own state is nearest.

Legend: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch

from coordinator.lab.privacy.score import ranks_of
from coordinator.lab.privacy.states import Array
from coordinator.lab.privacy.texts import Numbers
from edge_sdk.model.partition import Slice

# Rows of one product, so that no array is larger than a few hundred megabytes.
ROWS = 256
# Tokens of the vocabulary that pass through the model together.
TOGETHER = 512


class Vocabulary:
    """Each token of the vocabulary behind one that begins a text, block by block."""

    def __init__(self, model: Slice, first: int) -> None:
        """Begin with what enters the first block.

        Args:
            model: The device's blocks.
            first: The token that begins a text.
        """
        self._model, size = model, model.vocab_size
        self._ids_V2 = torch.tensor([[first, token] for token in range(size)])
        self._lengths_V = torch.full((size,), 2, dtype=torch.int32)
        self.split = 0
        with torch.no_grad():
            self._states_V2D = torch.cat(
                [
                    model.front(self._ids_V2[part], self._lengths_V[part], 0).float()
                    for part in parts(len(self._ids_V2), TOGETHER)
                ]
            )
        self.embeddings_VD: Array = self._states_V2D[:, 1].numpy().copy()
        """What enters the first block for each token, there where the second of a text stands."""
        self._first = first

    def place_offsets(self, longest: int) -> Array:
        """Return what learned positions add to that at each position of a text, (T, D)."""
        ids_1T = torch.full((1, longest), self._first)
        with torch.no_grad():
            whole_1TD = self._model.front(ids_1T, torch.tensor([longest]), 0).float()
        found: Array = (whole_1TD[0] - whole_1TD[0, min(1, longest - 1)]).numpy()
        return found

    def to(self, split: int) -> None:
        """Run the blocks up to *split*."""
        if split == self.split:
            return
        with torch.no_grad():
            for part in parts(len(self._ids_V2), TOGETHER):
                self._states_V2D[part] = self._model.middle(
                    self._states_V2D[part],
                    self._lengths_V[part],
                    self.split,
                    split,
                    self._ids_V2[part],
                ).float()
        self.split = split

    @property
    def states_VD(self) -> Array:  # noqa: N802 - the shape
        """The state of each token after the blocks."""
        found: Array = self._states_V2D[:, 1].numpy()
        return found


def parts(size: int, most: int) -> list[slice]:
    """Return stretches of at most *most* that together are *size*."""
    return [slice(first, first + most) for first in range(0, size, most)]


def shift_of(states_ND: Array, ids_N: Numbers, table_VD: Array) -> Array:
    """Return the mean difference (D,) of states from what *table_VD* has for their tokens.

    The attacker takes it from texts that it knows; 0 where a state is the table's own.
    """
    found: Array = (states_ND - table_VD[ids_N]).mean(0)
    return found


def nearest_ranks(states_ND: Array, ids_N: Numbers, table_VD: Array) -> Numbers:
    """Return how many tokens lie in the direction of a state as well as the true one, or better."""
    unit_VD = _unit(table_VD)
    found = []
    for part in parts(len(states_ND), ROWS):
        found.append(ranks_of(_unit(states_ND[part]) @ unit_VD.T, ids_N[part]))
    return np.concatenate(found)


def nearest_tokens(states_ND: Array, table_VD: Array, most: int) -> Numbers:
    """Return the *most* tokens that lie most in the direction of each state, the nearest first."""
    unit_VD, found = _unit(table_VD), []
    for part in parts(len(states_ND), ROWS):
        scores_NV = torch.from_numpy(_unit(states_ND[part]) @ unit_VD.T)
        found.append(scores_NV.topk(min(most, len(table_VD)), dim=1).indices.numpy())
    return np.concatenate(found)


def _unit(rows_ND: Array) -> Array:
    norms_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    found: Array = rows_ND / np.maximum(norms_N1, np.float32(1e-30))
    return found
