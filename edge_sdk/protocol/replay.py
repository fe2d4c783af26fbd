"""Hidden states of frozen blocks, which are sent once: what both sides count with. Pure.

Both sides see the same orders in the same order, so that each knows by itself when what was sent
before holds no more. What the coordinator has kept it says with each answer. Not here: where it is
kept.

Legend: B sequences, T positions, D hidden size, C sequences whose state is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.codecs import Array
from edge_sdk.protocol.messages import FACTORS, RESIDUAL, RoundStart

_ENDINGS = tuple(tensor.ending for tensor in (*FACTORS, *RESIDUAL) if tensor.ending)
# Samples are counted from 0; more have no room anywhere.
MOST_SAMPLES = 2**40


class Unchanged:
    """Since which step the blocks of a device have computed the same."""

    def __init__(self) -> None:
        self._since: int | None = None

    def begin(self, start: RoundStart, tensors: Iterable[str]) -> bool:
        """Take a RoundStart in; return whether what was computed before it still holds.

        Args:
            start: The order.
            tensors: Names of the tensors that came with it.
        """
        if start.restore_step >= 0:
            holds = self._since is not None and start.restore_step >= self._since
        else:
            is_new = start.is_full or any(name.endswith(_ENDINGS) for name in tensors)
            holds = self._since is not None and not is_new
        if not holds:
            self._since = start.stamp.step
        return holds

    def forget(self) -> None:
        """Assume nothing any more: the device has begun anew."""
        self._since = None


def check_rows(samples: Sequence[int], replays: Sequence[int], rows: int, hidden: int) -> None:
    """Refuse an Activation whose rows do not add up.

    Args:
        samples: Number of each sequence's sample.
        replays: Sequences of which no state came.
        rows: B, by the lengths.
        hidden: C, by the tensor that came.

    Raises:
        RemoteProtocolError: they do not.
    """
    if len(samples) != rows:
        raise RemoteProtocolError(f"{len(samples)} samples of {rows} sequences")
    if not all(0 <= sample < MOST_SAMPLES for sample in samples):
        raise RemoteProtocolError(f"samples outside 0..{MOST_SAMPLES - 1}")
    if list(replays) != sorted(set(replays)) or not all(0 <= row < rows for row in replays):
        raise RemoteProtocolError(f"replays outside 0..{rows - 1}, or not in their order")
    if hidden != rows - len(replays):
        raise RemoteProtocolError(f"{hidden} hidden states of {rows - len(replays)} sequences")


def sent_rows(replays: Sequence[int], rows: int) -> list[int]:
    """Return the sequences whose state is sent: all that are not in *replays*."""
    return sorted(set(range(rows)) - set(replays))


def joined(states: dict[int, Array], rows: int, longest: int, width: int) -> Array:
    """Return (B, T, D): the states of all sequences, zeros where a sequence has ended.

    Args:
        states: (t, D) by sequence, t at most *longest*.
        rows: B.
        longest: T.
        width: D.
    """
    hidden_BTD = np.zeros((rows, longest, width), np.float32)
    for row, state_TD in states.items():
        hidden_BTD[row, : len(state_TD)] = state_TD
    return hidden_BTD
