"""Inversion by trying: each candidate is run through the device's blocks behind what is known.

Somebody who knows the device's weights, as a coordinator does at the start of a round, can compute
what any text would give. A decoder's state depends on the tokens up to its own alone, so a text
is found one token after the other: the candidate whose state is nearest is taken. Where none is as
near as the codec's own error allows, more candidates are tried.

Legend: K candidates, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from coordinator.lab.privacy.states import Array
from coordinator.lab.privacy.texts import Numbers
from edge_sdk.model.partition import Slice

# How many candidates are tried at first, and how many where these do not do.
WIDTHS = (8, 64, 256)
# A candidate is taken at once whose state is as near as so many times what the codec has moved it.
CLOSE = 2.0
# Relative difference of states that comes from rounding.
ROUNDING = 1e-3


def find_text(
    model: Slice, split: int, states_TD: Array, candidates_TK: Numbers, error: float
) -> list[int]:
    """Return the tokens of one text, the first candidates where no other is nearer.

    Args:
        model: The device's blocks.
        split: How many of them have run.
        states_TD: What the coordinator has of the text.
        candidates_TK: Tokens to try for each position, the likeliest first.
        error: Distance by which the codec moves a state, root mean square.
    """
    found: list[int] = []
    for place, state_D in enumerate(states_TD):
        enough = CLOSE * error + ROUNDING * float(np.linalg.norm(state_D))
        found.append(_best(model, split, found, state_D, candidates_TK[place], enough))
    return found


def merged(first_TK: Numbers, second_TK: Numbers) -> Numbers:
    """Return the candidates of two attacks in turn, each token once, (T, K)."""
    size = first_TK.shape[1]
    turns_TK = np.stack([first_TK, second_TK], axis=2).reshape(len(first_TK), -1)
    return np.stack([np.array(list(dict.fromkeys(row.tolist()))[:size]) for row in turns_TK])


def _best(
    model: Slice,
    split: int,
    before: Sequence[int],
    state_D: Array,
    candidates_K: Numbers,
    enough: float,
) -> int:
    nearest, least, tried = int(candidates_K[0]), float("inf"), 0
    for width in WIDTHS:
        fresh = candidates_K[tried:width]
        if len(fresh) == 0 or least <= enough:
            break
        distances_K = np.linalg.norm(_states(model, split, before, fresh) - state_D, axis=1)
        index = int(distances_K.argmin())
        if distances_K[index] < least:
            nearest, least = int(fresh[index]), float(distances_K[index])
        tried = width
    return nearest


def _states(model: Slice, split: int, before: Sequence[int], last_K: Numbers) -> Array:
    """Return what each of the candidates would give behind the tokens *before*, (K, D)."""
    ids_KT = torch.tensor([[*before, int(token)] for token in last_K])
    lengths_K = torch.full((len(last_K),), ids_KT.shape[1], dtype=torch.int32)
    with torch.no_grad():
        found: Array = model.front(ids_KT, lengths_K, split)[:, -1].float().numpy()
    return found
