"""Numbers in few bits, in groups that share a scale: the arithmetic alone, in numpy, without loops.

Not here: what such tensors are called, and where they are used (`codecs.py`). Legend: G groups, N
numbers of a group, S bytes of a group.

A group is `GROUP` numbers: first its scale, two bytes, then the codes of its numbers. A scale is
the upper half of a float32: dL/dh is often smaller than the smallest float16. Decoding multiplies
and adds whole numbers below 2^24 and scales of eight bits, all of which float32 holds exactly, so
every machine and library decodes the same bits, whatever the order of its sums.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GROUP = 64
"""Numbers that share a scale; divides the hidden size of every model that we know."""
SCALE_BYTES = 2
# Work on so many groups at a time: they stay in the L2 cache.
_BLOCK = 1024
# Best distance between the levels of a normal distribution of unit variance, by bits (Max, 1960).
_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
# Smaller scales are none: their inverse would be infinite.
_LEAST_SCALE = np.float32(1e-37)
# Signs in front of the rotation, the bits of the golden ratio: numbers that are all alike would
# otherwise become one large number and 63 zeros.
_SIGNS = 0x9E3779B97F4A7C15


def group_bytes(bits: int) -> int:
    """Return the bytes of one group on the wire."""
    return SCALE_BYTES + GROUP * bits // 8


@lru_cache(maxsize=1)
def rotation() -> Floats:
    """Return eight times the rotation (N, N): a Hadamard matrix with the signs of its rows flipped.

    Its entries are 1 and -1, so that products with whole numbers are whole.
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < GROUP:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = [1.0 - 2.0 * (_SIGNS >> place & 1) for place in range(GROUP)]
    return np.ascontiguousarray(matrix * np.array(signs, np.float32)[:, None])


def encode_plain(numbers_GN: Floats, out_GS: Bytes) -> None:
    """Write groups in 8 bits, as multiples -127..127 of a scale.

    A number is off by half a scale at most, and zeros stay zeros. A group with NaN or infinity is
    read as NaN.
    """
    for start in range(0, len(numbers_GN), _BLOCK):
        part_GN, coded_GS = numbers_GN[start : start + _BLOCK], out_GS[start : start + _BLOCK]
        with np.errstate(all="ignore"):
            inverse_G = _inverse(_write_scales(_largest(part_GN) / np.float32(127), coded_GS))
            scaled_GN = part_GN * inverse_G[:, None]
            np.rint(scaled_GN, out=scaled_GN)
            coded_GS[:, SCALE_BYTES:] = scaled_GN.astype(np.int8).view(np.uint8)


def decode_plain(coded_GS: Bytes, out_GN: Floats) -> None:
    """Read what `encode_plain` has written."""
    codes_GN = coded_GS[:, SCALE_BYTES:].view(np.int8)
    with np.errstate(all="ignore"):
        np.multiply(codes_GN, _read_scales(coded_GS)[:, None], out=out_GN, dtype=np.float32)


def encode_rotated(numbers_GN: Floats, bits: int, out_GS: Bytes) -> None:
    """Write groups rotated, as odd multiples of a scale: -3..3 in 2 bits, -15..15 in 4.

    The rotation spreads a large number over its group, which then is close to normally distributed,
    for which the steps are the best. The scale is the one with the least error for the chosen
    codes, so that a group never comes out further from what it was than a group of zeros would.
    """
    half = 2 ** (bits - 1)
    matrix_NN = rotation() * np.float32(1 / 8)
    for start in range(0, len(numbers_GN), _BLOCK):
        with np.errstate(all="ignore"):
            rotated_GN = numbers_GN[start : start + _BLOCK] @ matrix_NN
            square_G = np.einsum("gn,gn->g", rotated_GN, rotated_GN)
            step_G = np.sqrt(square_G * np.float32(1 / GROUP)) * np.float32(_STEP[bits])
            places_GN = rotated_GN * _inverse(step_G)[:, None]
            np.floor(places_GN, out=places_GN)
            np.clip(places_GN, -half, half - 1, out=places_GN)
            codes_GN = places_GN.astype(np.int8).view(np.uint8)
            places_GN += places_GN
            places_GN += np.float32(1)  # the odd numbers
            scale_G = np.einsum("gn,gn->g", rotated_GN, places_GN)
            scale_G /= np.einsum("gn,gn->g", places_GN, places_GN)
            _write_scales(scale_G, out_GS[start : start + _BLOCK])
        pack(codes_GN + np.uint8(half), bits, out_GS[start : start + _BLOCK, SCALE_BYTES:])


def decode_rotated(coded_GS: Bytes, bits: int, out_GN: Floats) -> None:
    """Read what `encode_rotated` has written."""
    back_NN = np.ascontiguousarray(rotation().T)
    top = np.float32(2**bits - 1)
    for start in range(0, len(coded_GS), _BLOCK):
        part_GS = coded_GS[start : start + _BLOCK]
        odd_GN = unpack(part_GS[:, SCALE_BYTES:], bits).astype(np.float32)
        odd_GN += odd_GN
        odd_GN -= top
        found_GN = np.matmul(odd_GN, back_NN, out=out_GN[start : start + _BLOCK])
        with np.errstate(all="ignore"):
            found_GN *= (_read_scales(part_GS) * np.float32(1 / 8))[:, None]


def _largest(numbers_GN: Floats) -> Floats:
    """Return the largest magnitude of each group; NaN where there is one."""
    found_GN = np.abs(numbers_GN)
    while found_GN.shape[1] > 8:  # whole rows at a time; numpy's own `max` of short rows is slow
        half = found_GN.shape[1] // 2
        found_GN = np.maximum(found_GN[:, :half], found_GN[:, half:])
    largest_G: Floats = found_GN.max(1)
    return largest_G


# ---- scales --------------------------------------------------------------------------------------


def _write_scales(scale_G: Floats, out_GS: Bytes) -> Floats:
    """Write scales, rounded to sixteen bits; return them as they will be read.

    Those too small to have an inverse are written as 0, all that are not finite as NaN.
    """
    bits_G = scale_G.astype(np.float32, copy=False).view(np.uint32)
    halves_G = (
        (bits_G + np.uint32(0x7FFF) + (bits_G >> np.uint32(16) & np.uint32(1))) >> 16
    ).astype("<u2")
    halves_G[scale_G < _LEAST_SCALE] = 0
    halves_G[~np.isfinite(scale_G)] = 0x7FC0
    out_GS[:, :SCALE_BYTES] = halves_G[:, None].view(np.uint8)
    found_G: Floats = (halves_G.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found_G


def _inverse(scale_G: Floats) -> Floats:
    """Return 1 / scale, and 0 for a scale that has no inverse."""
    found = np.zeros_like(scale_G)
    np.divide(np.float32(1), scale_G, out=found, where=~(scale_G < _LEAST_SCALE))
    return found


def _read_scales(coded_GS: Bytes) -> Floats:
    halves_G = np.ascontiguousarray(coded_GS[:, :SCALE_BYTES]).view("<u2").ravel()
    found: Floats = (halves_G.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found


# ---- codes ---------------------------------------------------------------------------------------


def _planes(bits: int) -> list[tuple[int, int]]:
    """Return how codes are cut: the first bit and the number of bits of each part."""
    return {2: [(0, 2)], 3: [(0, 2), (2, 1)], 4: [(0, 4)]}[bits]


def pack(codes_GN: Bytes, bits: int, out_GS: Any) -> None:
    """Write codes, of which only the low *bits* count.

    A byte holds codes that stand far apart in the group, so that whole rows are shifted at a time.
    """
    begin = 0
    for low, width in _planes(bits):
        size = GROUP * width // 8
        found = out_GS[:, begin : begin + size]
        mask = np.uint8(2**width - 1)
        found[:] = codes_GN[:, :size] >> np.uint8(low) & mask
        for place in range(1, 8 // width):
            part = codes_GN[:, place * size : (place + 1) * size] >> np.uint8(low) & mask
            found |= part << np.uint8(place * width)
        begin += size


def unpack(packed_GS: Any, bits: int) -> Bytes:
    """Return codes (G, N) that `pack` has written; a fresh array."""
    codes_GN = np.empty((len(packed_GS), GROUP), np.uint8)
    begin = 0
    for low, width in _planes(bits):
        size = GROUP * width // 8
        part = packed_GS[:, begin : begin + size]
        mask = np.uint8(2**width - 1)
        for place in range(8 // width):
            shifted = part >> np.uint8(place * width) & mask
            into = codes_GN[:, place * size : (place + 1) * size]
            if low:
                into |= shifted << np.uint8(low)
            else:
                into[:] = shifted
        begin += size
    return codes_GN
