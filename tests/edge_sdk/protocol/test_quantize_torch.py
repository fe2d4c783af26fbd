"""The format of few bits in torch, written here anew from its description: both read the same bits.

In the product every tensor passes through numpy on its way to the wire, whatever computes it.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.protocol import codecs, quantize

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352}
NAMES = ("int8", "int4", "int3", "int2")
GROUPS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.just(64)), elements=st.floats(-1e4, 1e4, width=32)
)


def scales_of(coded: torch.Tensor) -> torch.Tensor:
    """The scales: upper halves of float32."""
    low, high = coded[:, 0].to(torch.int32), coded[:, 1].to(torch.int32)
    return ((high << 24) | (low << 16)).view(torch.float32)


def read(coded: torch.Tensor, bits: int) -> torch.Tensor:
    """Decode in torch."""
    scales, body = scales_of(coded)[:, None], coded[:, 2:]
    if bits == 8:
        return body.view(torch.int8).float() * scales
    width = min(bits, 2) if bits == 3 else bits
    size = 64 * width // 8
    parts = [body[:, :size] >> (width * i) & (2**width - 1) for i in range(8 // width)]
    codes = torch.cat(parts, 1)
    if bits == 3:
        codes = codes | torch.cat([(body[:, size:] >> i & 1) << 2 for i in range(8)], 1)
    odd = 2 * codes.float() - (2**bits - 1)
    return (odd @ torch.from_numpy(quantize.rotation()).T) * (scales / 8)


def write(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Encode in torch."""
    if bits == 8:
        scales = numbers.abs().amax(1) / 127
    else:
        rotated = numbers @ torch.from_numpy(quantize.rotation()) / 8
        step = rotated.square().mean(1).sqrt() * STEPS[bits]
        inverse = torch.where(step < 1e-37, 0.0, 1 / step)[:, None]
        places = torch.floor(rotated * inverse).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        odd = 2 * places + 1
        scales = (rotated * odd).sum(1) / odd.square().sum(1)
    scales = torch.where(scales < 1e-37, 0.0, scales)
    halves = scales.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    head = torch.stack([halves & 255, halves >> 8], 1).to(torch.uint8)
    if bits == 8:
        kept = (halves << 16).view(torch.float32)
        inverse = torch.where(kept < 1e-37, 0.0, 1 / kept)[:, None]
        return torch.cat([head, (numbers * inverse).round().to(torch.int8).view(torch.uint8)], 1)
    codes = (places + 2 ** (bits - 1)).to(torch.uint8)
    planes = [(0, 2), (2, 1)] if bits == 3 else [(0, bits)]
    packed = [head]
    for low, width in planes:
        size = 64 * width // 8
        plane = torch.zeros(len(codes), size, dtype=torch.uint8)
        for i in range(8 // width):
            part = codes[:, i * size : (i + 1) * size] >> low & (2**width - 1)
            plane |= part << (width * i)
        packed.append(plane)
    return torch.cat(packed, 1)


@pytest.mark.parametrize("name", NAMES)
@given(array=GROUPS)
@settings(deadline=None)
def test_what_numpy_writes_torch_reads_to_the_bit(name: str, array: np.ndarray) -> None:
    """Whatever the numbers, both decoders return the same bits."""
    coded = codecs.encode(array, name)

    found = read(torch.from_numpy(coded.reshape(len(array), -1).copy()), int(name[3:]))

    np.testing.assert_array_equal(found.numpy(), codecs.decode(coded, name, array.shape))


@pytest.mark.parametrize("name", NAMES)
@given(array=GROUPS)
@settings(deadline=None)
def test_what_torch_writes_numpy_reads_to_the_bit(name: str, array: np.ndarray) -> None:
    """Whoever has written them, bytes mean the same numbers to both."""
    coded = write(torch.from_numpy(array), int(name[3:]))

    found = codecs.decode(coded.numpy().tobytes(), name, array.shape)

    np.testing.assert_array_equal(found, read(coded, int(name[3:])).numpy())


def test_eight_bits_are_written_alike() -> None:
    """Where nothing is summed, numpy and torch write the same bytes."""
    array = np.random.default_rng(0).standard_normal((50, 64), np.float32)

    coded = write(torch.from_numpy(array), 8).numpy()

    np.testing.assert_array_equal(coded.ravel(), codecs.encode(array, "int8"))
