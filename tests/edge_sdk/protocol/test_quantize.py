"""Numbers in few bits: bounds of what is lost, what is kept, and bytes that mean one thing only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.errors import LocalProtocolError
from edge_sdk.protocol import codecs, quantize

# Most of a group's energy that is lost, whatever the group: the square of the least cosine between
# a group and its codes, over many groups of every kind; and of normally distributed ones.
ROTATED = {"int4": (0.35, 0.0120), "int3": (0.75, 0.0385), "int2": (0.95, 0.125)}
NAMES = ("int8", *ROTATED)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
NUMBERS = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_any_shape_comes_back(name: str, data: st.DataObject) -> None:
    """Arrays of every shape arrive in it, finite, in the bytes that were announced."""
    array = data.draw(hnp.arrays(np.float32, SHAPES, elements=NUMBERS))

    coded = codecs.encode(array, name)
    back = codecs.decode(coded, name, array.shape)

    assert len(coded) == codecs.encoded_bytes(name, array.shape)
    assert (back.shape, back.dtype) == (array.shape, np.float32)
    assert np.isfinite(back).all()


@given(array=hnp.arrays(np.float32, st.integers(1, 200), elements=NUMBERS))
def test_int8_is_off_by_half_a_step_at_most(array: np.ndarray) -> None:
    """No number is further off than 1/254 of the largest of its group, and zeros stay zeros.

    A step below the least normal number may be nothing: some libraries have the processor round
    such numbers to 0.
    """
    back = codecs.as_read(array, "int8")
    nothing = 128 * np.finfo(np.float32).tiny

    for start in range(0, len(array), quantize.GROUP):
        part = slice(start, start + quantize.GROUP)
        largest = np.abs(array[part]).max()
        bound = max(largest * (1 / 254) * 1.01, min(largest, nothing))
        assert (np.abs(back[part] - array[part]) <= bound).all()
    assert (back[array == 0] == 0).all()


@pytest.mark.parametrize("name", ROTATED)
@given(array=hnp.arrays(np.float32, 64, elements=NUMBERS))
def test_a_group_is_never_worse_than_nothing(name: str, array: np.ndarray) -> None:
    """Whatever the numbers, what is lost of a group has less energy than the group."""
    array[np.abs(array) < 1e-10] = 0  # squares of smaller numbers are none

    lost = codecs.as_read(array, name) - array

    assert np.square(lost, dtype=np.float64).sum() <= (
        ROTATED[name][0] * np.square(array, dtype=np.float64).sum()
    )


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("kind", ["normal", "outliers", "alike"])
def test_few_bits_lose_what_the_best_levels_lose(name: str, kind: str) -> None:
    """Whatever the kind of numbers, no more is lost than the best levels for a normal one lose."""
    draw = np.random.default_rng(0)
    array = draw.standard_normal((2000, 64), np.float32)
    if kind == "outliers":
        array[:, 3] *= 50
    elif kind == "alike":
        array = 1 + array / 10

    lost = codecs.as_read(array, name) - array

    bound = ROTATED[name][1] * (1.0 if kind == "normal" else 1.3)
    assert (lost**2).sum() <= bound * (array**2).sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-5, 1.0, 1e6, 1e15])
def test_small_and_large_numbers_keep_their_digits(name: str, scale: float) -> None:
    """A gradient of 1e-12 loses no more than a hidden state of 1: scales are wide enough."""
    if scale < 1e-15 and name != "int8":
        scale = 1e-15
    array = np.random.default_rng(0).standard_normal((50, 64), np.float32)
    power = np.float32(2.0 ** np.round(np.log2(scale)))

    np.testing.assert_array_equal(
        codecs.as_read(array * power, name), codecs.as_read(array, name) * power
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_become_finite(name: str, bad: float) -> None:
    """A group with NaN or infinity arrives as NaN, for the reader to refuse; others are intact."""
    array = np.ones((3, 64), np.float32)
    array[1, 7] = bad

    back = codecs.as_read(array, name)

    assert np.isnan(back[1]).all()
    assert np.isfinite(back[[0, 2]]).all()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_any_bytes_can_be_read(name: str, data: st.DataObject) -> None:
    """Bytes of a hostile peer become numbers or NaN; a byte more or less is refused unread."""
    num_groups = data.draw(st.integers(0, 3))
    size = codecs.encoded_bytes(name, (num_groups, 64))
    coded = data.draw(st.binary(min_size=size, max_size=size))

    back = codecs.decode(coded, name, (num_groups, 64))

    assert back.shape == (num_groups, 64)
    for wrong in (coded + b"x", coded[1:] if coded else b"xy"):
        with pytest.raises(LocalProtocolError, match="takes"):
            codecs.decode(wrong, name, (num_groups, 64))


@pytest.mark.parametrize("name", NAMES)
def test_reading_is_exact_arithmetic(name: str) -> None:
    """Decoding in float64, where nothing is rounded, gives the same bits: all machines agree."""
    array = np.random.default_rng(0).standard_normal((100, 64), np.float32)
    coded_GS = codecs.encode(array, name).reshape(100, -1)
    bits = int(name[3:])

    halves_G = np.ascontiguousarray(coded_GS[:, : quantize.SCALE_BYTES]).view("<u2").ravel()
    scale_G1 = (halves_G.astype(np.uint32) << 16).view(np.float32)[:, None].astype(np.float64)
    if bits == 8:
        exact_GN = coded_GS[:, quantize.SCALE_BYTES :].view(np.int8) * scale_G1
    else:
        codes_GN = quantize.unpack(coded_GS[:, quantize.SCALE_BYTES :], bits).astype(np.float64)
        exact_GN = (2 * codes_GN - 2**bits + 1) @ quantize.rotation().T * (scale_G1 / 8)

    np.testing.assert_array_equal(codecs.decode(coded_GS.ravel(), name, (100, 64)), exact_GN)
