"""How the numbers of a tensor are written: one table of codecs for both sides; numpy only.

Not here: which tensors a message brings (`messages.py`), and how bytes are cut into chunks
(`fragments.py`). Everything is little-endian on the wire. To add a codec, derive from `Codec` and
append it to `CODECS`; configuration, greeting, doctor and planner read that table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import LocalProtocolError, NumericError
from edge_sdk.protocol import quantize

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Memory = dict[str, Array]
"""What a codec knows of the tensors that went before, in one stream: a tensor of a message, in
one direction of a session. Both ends begin with an empty one and see the same tensors."""
Memories = dict[Any, Memory]

# Nothing we send has more than four dimensions; numpy itself stops at 64.
MAX_DIMENSIONS = 8

# bfloat16 is made with several passes of numpy; blocks of this many numbers stay in the L2 cache.
_BLOCK = 32 * 1024


class Codec:
    """One way to write numbers; this one writes them as they are, or as numpy casts them.

    Args:
        name: What configuration and messages call it.
        wire: Dtype of a number on the wire.
        array: Dtype of what is encoded and of what `decode` returns.
    """

    has_memory = False
    """Whether `prepare` and `decode` use their memory."""

    def __init__(self, name: str, wire: str, array: str = "<f4") -> None:
        self.name, self.wire, self.array = name, np.dtype(wire), np.dtype(array)

    @property
    def bytes_per_number(self) -> float:
        """Bytes that a number of a large tensor takes on the wire; what the planner counts with."""
        return float(self.wire.itemsize)

    def group(self, shape: Sequence[int]) -> int:
        """Return how many neighbouring numbers of a tensor of *shape* must not be cut apart.

        It divides the number of all numbers; each group takes equally many bytes.
        """
        return 1

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return how many bytes a tensor of *shape* takes on the wire."""
        total = self.wire.itemsize
        for size in shape:
            total *= int(size)  # Python ints: a numpy product would wrap around
        return total

    def prepare(self, array: Array, memory: Memory) -> Array:
        """Return what is to be written for *array*, in its shape; called once for each tensor.

        Error feedback and residual coding happen here: chunks may be written several times.
        """
        return array

    def encode_into(self, groups_GN: Array, out: Bytes) -> None:
        """Write whole groups, N numbers each, into the bytes *out*."""
        row, target = groups_GN.reshape(-1), out.view(self.wire)
        if self.wire == self.array:
            target[:] = row
            return
        with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf; the reader says
            target[:] = row

    def decode(self, buffer: Any, shape: Sequence[int], memory: Memory) -> Array:
        """Return the numbers in *buffer*, which has `num_bytes` of *shape*, in any shape."""
        row = np.frombuffer(buffer, self.wire)
        if self.wire != self.array:
            return row.astype(self.array)
        # Received frames begin anywhere, and ARM cores mind.
        return row if row.flags.aligned else row.copy()


class Bfloat16(Codec):
    """The upper half of each float32, rounded to nearest, ties to even."""

    def __init__(self) -> None:
        super().__init__("bfloat16", "<u2")

    def encode_into(self, groups_GN: Array, out: Bytes) -> None:
        """Write rounded upper halves; NaN stays NaN (rounding could carry it to infinity)."""
        row, target = groups_GN.reshape(-1), out.view(self.wire)
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

    def decode(self, buffer: Any, shape: Sequence[int], memory: Memory) -> Array:
        """Return the float32 whose upper halves are in *buffer*."""
        bits = np.frombuffer(buffer, self.wire).astype("<u4")
        bits <<= np.uint32(16)
        return bits.view("<f4")


class GroupedCodec(Codec):
    """Whole numbers of few bits, with a scale for every 64 of them (`quantize.py`).

    8 bits keep 2 digits and more of each number: nobody is off by over 1/254 of the largest of its
    group. Fewer bits are rotated first, which spreads what a group loses evenly; of a group's
    energy they lose about 1 % (4 bits), 4 % (3 bits) and 12 % (2 bits), and never more than there
    is. What is not finite arrives as NaN, as does all of its group. The last group of a tensor is
    filled up with zeros.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(f"int{bits}", "u1")
        self._bits, self._size = bits, quantize.group_bytes(bits)

    @property
    def bytes_per_number(self) -> float:
        """Bytes that a number of a large tensor takes on the wire, its part of a scale included."""
        return self._size / quantize.GROUP

    def group(self, shape: Sequence[int]) -> int:
        """Return the numbers of a group; all of a tensor that is not made of whole groups."""
        total = math.prod(map(int, shape))
        return total if total % quantize.GROUP else quantize.GROUP

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of all groups."""
        return -(-math.prod(map(int, shape)) // quantize.GROUP) * self._size

    def encode_into(self, groups_GN: Array, out: Bytes) -> None:
        """Write whole groups, or a whole tensor."""
        coded_GS = out.reshape(-1, self._size)
        rest = groups_GN.size % quantize.GROUP
        if rest:
            row = groups_GN.reshape(-1)
            whole = groups_GN.size - rest
            self._encode(row[:whole].reshape(-1, quantize.GROUP), coded_GS[:-1])
            last_1N = np.zeros((1, quantize.GROUP), np.float32)
            last_1N[0, :rest] = row[whole:]
            self._encode(last_1N, coded_GS[-1:])
        else:
            self._encode(groups_GN.reshape(-1, quantize.GROUP), coded_GS)

    def _encode(self, numbers_GN: Array, coded_GS: Bytes) -> None:
        if self._bits == 8:
            quantize.encode_plain(numbers_GN, coded_GS)
        else:
            quantize.encode_rotated(numbers_GN, self._bits, coded_GS)

    def decode(self, buffer: Any, shape: Sequence[int], memory: Memory) -> Array:
        """Return the numbers of all groups, without those that filled up the last one."""
        coded_GS = np.frombuffer(buffer, np.uint8).reshape(-1, self._size)
        found_GN = np.empty((len(coded_GS), quantize.GROUP), np.float32)
        if self._bits == 8:
            quantize.decode_plain(coded_GS, found_GN)
        else:
            quantize.decode_rotated(coded_GS, self._bits, found_GN)
        return found_GN.reshape(-1)[: math.prod(map(int, shape))]


# The place in this table is the codec's number on the wire: append, never reorder.
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("float32", "<f4"),
        Bfloat16(),
        Codec("float16", "<f2"),
        Codec("int32", "<i4", "<i4"),
        Codec("int64", "<i8", "<i8"),
        Codec("uint8", "u1", "u1"),
        *map(GroupedCodec, (8, 4, 3, 2)),
        Codec("int16", "<i2", "<i4"),
    )
}


def find(name: str) -> Codec:
    """Return the codec called *name*."""
    codec = CODECS.get(name)
    if codec is None:
        raise LocalProtocolError(f"codec {name!r} is not one of {', '.join(CODECS)}")
    return codec


def float_codecs() -> tuple[str, ...]:
    """Return the codecs that hidden states and gradients may take, the smallest first."""
    floats = [codec for codec in CODECS.values() if codec.array == np.float32]
    return tuple(codec.name for codec in sorted(floats, key=lambda one: one.bytes_per_number))


def memory_of(name: str, memories: Memories, *stream: Any) -> Memory:
    """Return the memory of *stream* among *memories*; a codec that needs none leaves no trace."""
    return memories.setdefault(stream, {}) if find(name).has_memory else {}


def encoded_bytes(name: str, shape: Sequence[int]) -> int:
    """Return how many bytes a tensor of *shape* takes on the wire."""
    if len(shape) > MAX_DIMENSIONS:
        raise LocalProtocolError(f"{len(shape)} dimensions, at most {MAX_DIMENSIONS} are allowed")
    if shape and min(shape) < 0:
        raise LocalProtocolError(f"shape {tuple(shape)} has a negative dimension")
    return find(name).num_bytes(shape)


def grouped(array: Array, name: str, memory: Memory) -> Array:
    """Return what codec *name* is to write for *array*: one contiguous row for each group."""
    codec = find(name)
    if array.dtype != codec.array:
        raise LocalProtocolError(
            f"codec {name} writes arrays of dtype {codec.array}, got {array.dtype}"
        )
    if array.ndim > MAX_DIMENSIONS:
        raise LocalProtocolError(f"{array.ndim} dimensions, at most {MAX_DIMENSIONS} are allowed")
    due = np.ascontiguousarray(codec.prepare(array, memory))
    return due.reshape(-1, max(1, codec.group(array.shape)))


def encode(array: Array, name: str) -> Bytes:
    """Return the bytes of *array*, a tensor that stands alone."""
    out = np.empty(encoded_bytes(name, array.shape), np.uint8)
    find(name).encode_into(grouped(array, name, {}), out)
    return out


def decode(buffer: Any, name: str, shape: Sequence[int], memory: Memory | None = None) -> Array:
    """Return the tensor in *buffer*; it shares the memory of *buffer* where dtype and place allow.

    Args:
        buffer: Anything with the buffer protocol, of exactly the right length.
        name: Name of the codec.
        shape: Dimensions, at most `MAX_DIMENSIONS`.
        memory: Memory of the tensor's stream; None for a tensor that stands alone.
    """
    codec = find(name)
    due, got = encoded_bytes(name, shape), memoryview(buffer).nbytes
    if due != got:
        raise LocalProtocolError(f"{name} of shape {tuple(shape)} takes {due} bytes, got {got}")
    try:
        if not got:
            return np.empty(tuple(shape), codec.array)
        return codec.decode(buffer, shape, {} if memory is None else memory).reshape(tuple(shape))
    except (ValueError, OverflowError) as error:  # (0, 2**62, 2**62): no bytes, yet too large
        raise LocalProtocolError(f"shape {tuple(shape)} is not possible: {error}") from error


def as_read(array: Array, name: str) -> Array:
    """Return what a reader makes of *array*, bit for bit; for codecs without memory."""
    return decode(encode(array, name), name, array.shape)


def require_finite(array: Array, what: str) -> None:
    """Raise `NumericError` naming *what* if *array* holds NaN or infinity."""
    if array.dtype.kind != "f":
        return
    # One pass: a finite sum has finite terms; a sum that overflowed gets a second look.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum()):
            return
    num_bad = array.size - int(np.isfinite(array).sum())
    if num_bad:
        raise NumericError(f"{what}: {num_bad} of {array.size} numbers are NaN or infinite")
