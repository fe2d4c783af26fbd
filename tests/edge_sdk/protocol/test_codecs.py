"""Tensor codecs: what is decoded is what was encoded, up to the rounding that was asked for."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.errors import LocalProtocolError, NumericError
from edge_sdk.protocol import codecs

EXACT = ("float32", "int32", "int64", "uint8")


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
def test_exact_codecs_change_nothing(name: str, data: st.DataObject) -> None:
    """Codecs that keep every bit return the array that went in, whatever its shape."""
    shape = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    array = data.draw(hnp.arrays(codecs.find(name).array, shape))

    back = codecs.decode(codecs.encode(array, name), name, array.shape)

    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@given(st.integers(0, 2**32 - 1))
def test_bfloat16_rounds_to_nearest_even(bits: int) -> None:
    """A float32 becomes the nearest bfloat16, ties to even; NaN stays NaN."""
    value = np.array([bits], np.uint32).view(np.float32)

    back = codecs.decode(codecs.encode(value, "bfloat16"), "bfloat16", (1,))

    if np.isnan(value[0]):
        assert np.isnan(back[0])
        return
    low = bits >> 16
    rest = bits & 0xFFFF
    due = low + (rest > 0x8000 or (rest == 0x8000 and low & 1))
    assert int(back.view(np.uint32)[0]) == due << 16


def test_float16_is_numpys() -> None:
    """float16 rounds as numpy does and comes back as float32; too large becomes infinity."""
    array = np.array([[0.1, -2.5], [65504.0, 1e6]], np.float32)

    back = codecs.decode(codecs.encode(array, "float16"), "float16", (2, 2))

    assert back.dtype == np.float32
    assert back[0, 0] == np.float32(np.float16(0.1))
    assert np.isinf(back[1, 1])


def test_bfloat16_is_fast() -> None:
    """Four megabytes become bfloat16 in less than five milliseconds (best of many)."""
    array = np.random.default_rng(0).standard_normal(1024 * 1024, dtype=np.float32)

    times = []
    for _ in range(15):
        begin_s = time.perf_counter()
        codecs.encode(array, "bfloat16")
        times.append(time.perf_counter() - begin_s)

    assert min(times) < 0.005


@pytest.mark.parametrize(
    ("name", "length", "shape"),
    [
        ("float32", 15, (4,)),
        ("float32", 16, (5,)),
        ("bfloat16", 16, (2**62, 2**62)),
        ("uint8", 0, (0, 2**62, 2**62)),
        ("uint8", 1, (1,) * 9),
        ("uint8", 1, (-1, -1)),
        ("object", 8, (1,)),
        ("<M8[s]", 8, (1,)),
    ],
)
def test_wrong_sizes_and_types_are_refused(name: str, length: int, shape: tuple[int, ...]) -> None:
    """A buffer that does not fit its shape, or a codec we do not have, is never decoded."""
    with pytest.raises(LocalProtocolError):
        codecs.decode(bytes(length), name, shape)


def test_short_whole_numbers_come_back_as_int32() -> None:
    """int16 is how labels travel that fit: -100 and every token of a small vocabulary."""
    labels = np.array([[-100, 0, 5], [4095, 32767, -1]], np.int32)

    back = codecs.decode(codecs.encode(labels, "int16"), "int16", labels.shape)

    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, labels)


def test_encode_wants_the_codecs_own_dtype() -> None:
    """Nothing is cast on the quiet: float64 is not written as float32."""
    with pytest.raises(LocalProtocolError, match="float64"):
        codecs.encode(np.zeros(3), "float32")


def test_unaligned_buffers_become_aligned_arrays() -> None:
    """A tensor that begins anywhere in a frame is usable by code that needs alignment."""
    buffer = memoryview(bytes(1) + np.arange(3, dtype=np.int64).tobytes())[1:]

    back = codecs.decode(buffer, "int64", (3,))

    assert back.flags.aligned
    assert back.tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_require_finite_names_what_is_not(bad: float) -> None:
    """One NaN or infinity among many numbers is found, and the error says where."""
    array = np.ones((3, 4), np.float32)
    array[1, 2] = bad

    with pytest.raises(NumericError, match=r"hidden: 1 of 12"):
        codecs.require_finite(array, "hidden")


def test_require_finite_accepts_huge_and_whole_numbers() -> None:
    """Finite numbers whose sum overflows are finite, and integers always are."""
    codecs.require_finite(np.full(10, 3e38, np.float32), "x")
    codecs.require_finite(np.arange(3), "x")
