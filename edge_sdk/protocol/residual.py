"""Hidden states as changes: a sample's differ little from those of the epoch before. Pure.

Both sides hold, of each sample, what the receiver got the last time, bit for bit. The sender names
what its changes start from by a mark, a hash of the bytes; a receiver that holds something else, or
nothing, asks for whole tensors. What is lost of a change is part of the next one, so that errors do
not add up (AQ-SGD, arXiv 2206.01299). A sample without a start is written as a change from zeros,
and what that loses as `rest`: in parts, bits are nearly as good as all at once.

Legend: B sequences, T positions, D hidden size; W sequences that start from zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol import codecs
from edge_sdk.protocol.codecs import Array

RESIDUAL = "residual"
"""What configuration and messages call this way of sending."""
CHANGE, REST = "int2", "int4"
GRADIENT, TOP_GRADIENT = "int2", "int4"
"""Codecs of the gradients that come back, and of those from which the coordinator's own follow."""
WHOLE = "int8"
"""Codec of what is sent once: evaluations, and hidden states from which a loss is computed."""
# Of a change with more energy than so much of the state itself, whole tensors are as good.
_MOST_CHANGE = 0.5
# Samples are counted from 0; more have no room anywhere.
MOST_SAMPLES = 2**40


class Start(Protocol):
    """What is held of a sample."""

    @property
    def mark(self) -> int:
        """Hash of the bytes, 1 or more."""

    @property
    def array_TD(self) -> Array:  # noqa: N802 - the shape
        """The upper halves of float32."""


class Holds(Protocol):
    """What one side holds."""

    def get(self, sample: int, /) -> Start | None:
        """Return what is held of *sample*."""

    def put(self, sample: int, array_TD: Array, /) -> None:  # noqa: N803 - the shape
        """Hold *array_TD* of *sample*."""


class Coded(NamedTuple):
    """Hidden states on their way."""

    tensors: dict[str, tuple[Array, str]]
    starts: tuple[int, ...]
    """For each sequence the mark of what its change starts from; 0: zeros."""


def plain(name: str, own: str) -> str:
    """Return the codec of tensors that are not changes: *own* where *name* is `residual`."""
    return own if name == RESIDUAL else name


def code(hidden_BTD: Array, lengths_B: Sequence[int], samples: Sequence[int], held: Holds) -> Coded:
    """Return what is to be sent, and hold what the receiver will make of it."""
    start_BTD = np.zeros_like(hidden_BTD)
    starts = [0] * len(samples)
    for row, (sample, length) in enumerate(zip(samples, lengths_B, strict=True)):
        known, own_TD = held.get(sample), hidden_BTD[row, :length]
        if known is not None and known.array_TD.shape == own_TD.shape:
            before_TD = _wide(known.array_TD)
            change = own_TD - before_TD
            if np.vdot(change, change) < _MOST_CHANGE * np.vdot(own_TD, own_TD):
                start_BTD[row, :length], starts[row] = before_TD, known.mark
    change_BTD = hidden_BTD - start_BTD
    for row, length in enumerate(lengths_B):
        change_BTD[row, length:] = 0  # padding
    tensors = {"hidden": (change_BTD, CHANGE)}
    found_BTD = start_BTD + codecs.as_read(change_BTD, CHANGE)
    whole = [row for row, mark in enumerate(starts) if not mark]
    if whole:
        rest_WTD = change_BTD[whole] - found_BTD[whole]
        found_BTD[whole] += codecs.as_read(rest_WTD, REST)
        tensors["rest"] = (rest_WTD, REST)
    _hold(found_BTD, lengths_B, samples, held)
    return Coded(tensors, tuple(starts))


def read(
    tensors: Mapping[str, Array],
    samples: Sequence[int],
    starts: Sequence[int],
    held: Holds,
) -> Array | None:
    """Return the hidden states that *tensors* stand for, and hold them; None where a start is not.

    Raises:
        RemoteProtocolError: what came does not fit together.
    """
    change_BTD, lengths_B = tensors["hidden"], tensors["lengths"]
    whole = [row for row, mark in enumerate(starts) if not mark]
    _check(tensors, samples, starts, len(whole))
    found_BTD = np.zeros_like(change_BTD)
    for row, (sample, mark, length) in enumerate(zip(samples, starts, lengths_B, strict=True)):
        known = held.get(sample) if mark else None
        if mark:
            if known is None or known.mark != mark:
                return None
            if known.array_TD.shape != (length, change_BTD.shape[2]):
                raise RemoteProtocolError(f"sample {sample}: {length} positions, other than before")
            found_BTD[row, :length] = _wide(known.array_TD)
    found_BTD += change_BTD
    if whole:
        found_BTD[whole] += tensors["rest"]
    _hold(found_BTD, lengths_B.tolist(), samples, held)
    return found_BTD


def _check(
    tensors: Mapping[str, Array], samples: Sequence[int], starts: Sequence[int], num_whole: int
) -> None:
    """Refuse rows that are not all named, and positions outside of the tensor."""
    rows, longest, width = tensors["hidden"].shape
    if not len(samples) == len(starts) == rows:
        raise RemoteProtocolError(f"{len(samples)} samples and {len(starts)} starts of {rows} rows")
    if not all(0 <= sample < MOST_SAMPLES for sample in samples):
        raise RemoteProtocolError(f"samples outside 0..{MOST_SAMPLES - 1}")
    rest = tensors["rest"].shape if "rest" in tensors else (0, longest, width)
    if rest != (num_whole, longest, width):
        raise RemoteProtocolError(f"rest of shape {rest}, due: {(num_whole, longest, width)}")
    lengths_B = tensors["lengths"]
    if lengths_B.min(initial=1) < 1 or lengths_B.max(initial=1) > longest:
        raise RemoteProtocolError(f"lengths outside 1..{longest}")


def _hold(found_BTD: Array, lengths_B: Sequence[int], samples: Sequence[int], held: Holds) -> None:
    """Round to what both sides hold, in place, and hold it."""
    rows, longest, width = found_BTD.shape
    halves_BTD = codecs.encode(found_BTD, "bfloat16").view("<u2").reshape(rows, longest, width)
    found_BTD[:] = codecs.decode(halves_BTD, "bfloat16", found_BTD.shape)
    for row, (sample, length) in enumerate(zip(samples, lengths_B, strict=True)):
        found_BTD[row, length:] = 0  # padding
        held.put(sample, halves_BTD[row, :length].copy())


def _wide(halves_TD: Array) -> Array:
    return codecs.decode(np.ascontiguousarray(halves_TD), "bfloat16", halves_TD.shape)
