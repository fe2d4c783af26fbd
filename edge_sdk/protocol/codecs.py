"""How the numbers of a tensor are written: six codecs, numpy only.

Not here: which tensors a message brings (`messages.py`), and how bytes are cut into chunks
(`fragments.py`). Everything is little-endian on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import LocalProtocolError, NumericError

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

# Nothing we send has more than four dimensions; numpy itself stops at 64.
MAX_DIMENSIONS = 8

# bfloat16 is made with several passes of numpy; blocks of this many numbers stay in the L2 cache.
_BLOCK = 32 * 1024


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to write numbers."""

    name: str
    wire: np.dtype[Any]
    """What is on the wire; bfloat16 is held as the uint16 that it is made of."""
    array: np.dtype[Any]
    """What the caller gives to `encode` and gets from `decode`."""


def _codec(name: str, wire: str, array: str) -> Codec:
    return Codec(name, np.dtype(wire), np.dtype(array))


# The place in this tuple is the codec's number on the wire: append, never reorder.
_ALL = (
    _codec("float32", "<f4", "<f4"),
    _codec("bfloat16", "<u2", "<f4"),
    _codec("float16", "<f2", "<f4"),
    _codec("int32", "<i4", "<i4"),
    _codec("int64", "<i8", "<i8"),
    _codec("uint8", "u1", "u1"),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}
CODEC_NUMBERS: dict[str, int] = {codec.name: number for number, codec in enumerate(_ALL)}
CODEC_NAMES: tuple[str, ...] = tuple(codec.name for codec in _ALL)


def find(name: str) -> Codec:
    """Return the codec called *name*."""
    codec = CODECS.get(name)
    if codec is None:
        raise LocalProtocolError(f"codec {name!r} is not one of {', '.join(CODECS)}")
    return codec


def encoded_bytes(name: str, shape: Sequence[int]) -> int:
    """Return how many bytes a tensor of *shape* takes on the wire."""
    if len(shape) > MAX_DIMENSIONS:
        raise LocalProtocolError(f"{len(shape)} dimensions, at most {MAX_DIMENSIONS} are allowed")
    total = find(name).wire.itemsize
    for size in shape:
        if size < 0:
            raise LocalProtocolError(f"shape {tuple(shape)} has a negative dimension")
        total *= int(size)  # Python ints: a numpy product would wrap around
    return total


def flat(array: Array, name: str) -> Array:
    """Return *array* as one contiguous row, after checking that codec *name* can write it."""
    codec = find(name)
    if array.dtype != codec.array:
        raise LocalProtocolError(
            f"codec {name} writes arrays of dtype {codec.array}, got {array.dtype}"
        )
    if array.ndim > MAX_DIMENSIONS:
        raise LocalProtocolError(f"{array.ndim} dimensions, at most {MAX_DIMENSIONS} are allowed")
    return np.ascontiguousarray(array).reshape(-1)


def encode_into(row: Array, name: str, out: Bytes) -> None:
    """Write the numbers of *row* (from `flat`, or a slice of it) into the bytes *out*."""
    target = out.view(find(name).wire)
    if name == "bfloat16":
        _to_bfloat16(row, target)
    elif name == "float16":
        with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf; the reader says
            target[:] = row
    else:
        target[:] = row


def encode(array: Array, name: str) -> Bytes:
    """Return the bytes of *array*; for all but the two-byte floats these share its memory."""
    row = flat(array, name)
    codec = find(name)
    if codec.wire == codec.array:
        return row.view(np.uint8)
    out = np.empty(row.size * codec.wire.itemsize, np.uint8)
    encode_into(row, name, out)
    return out


def decode(buffer: Any, name: str, shape: Sequence[int]) -> Array:
    """Return the tensor in *buffer*; it shares the memory of *buffer* where dtype and place allow.

    Args:
        buffer: Anything with the buffer protocol, of exactly the right length.
        name: Codec.
        shape: Dimensions, at most `MAX_DIMENSIONS`.
    """
    codec = find(name)
    due, got = encoded_bytes(name, shape), memoryview(buffer).nbytes
    if due != got:
        raise LocalProtocolError(f"{name} of shape {tuple(shape)} takes {due} bytes, got {got}")
    row = np.frombuffer(buffer, codec.wire) if got else np.empty(0, codec.wire)
    if name == "bfloat16":
        row = _from_bfloat16(row)
    elif name == "float16":
        row = row.astype(codec.array)
    elif not row.flags.aligned:
        row = row.copy()  # received frames begin anywhere, and ARM cores mind
    try:
        return row.reshape(tuple(shape))
    except (ValueError, OverflowError) as error:  # (0, 2**62, 2**62): no bytes, yet too large
        raise LocalProtocolError(f"shape {tuple(shape)} is not possible: {error}") from error


def require_finite(array: Array, what: str) -> None:
    """Raise `NumericError` naming *what* if *array* holds NaN or infinity."""
    if array.dtype.kind != "f":
        return
    # One pass: a finite sum has finite terms; a sum that overflowed gets the second look.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum()):
            return
    num_bad = array.size - int(np.isfinite(array).sum())
    if num_bad:
        raise NumericError(f"{what}: {num_bad} of {array.size} numbers are NaN or infinite")


def _to_bfloat16(row: Array, target: NDArray[np.uint16]) -> None:
    """Round to nearest, ties to even; NaN stays NaN (rounding could carry it to infinity)."""
    bits = row.view(np.uint32)
    for start in range(0, bits.size, _BLOCK):
        part = bits[start : start + _BLOCK]
        rounded = part >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += part
        rounded >>= np.uint32(16)
        is_nan = np.isnan(row[start : start + _BLOCK])
        if is_nan.any():
            rounded[is_nan] = (part[is_nan] >> np.uint32(16)) | np.uint32(0x40)
        target[start : start + _BLOCK] = rounded


def _from_bfloat16(row: NDArray[np.uint16]) -> NDArray[np.float32]:
    bits = row.astype("<u4")
    bits <<= np.uint32(16)
    return bits.view("<f4")
