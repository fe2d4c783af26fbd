"""float16 carries what fits into it; the rest travels in bfloat16, and that is said once."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.protocol.codecs import decode, encode
from edge_sdk.protocol.roomy import RoomyCodec

LARGEST = 65504.0
# What float16 rounds down to its largest number still travels in it.
CASES = [
    ("float16", [1.0, -2.0], "float16"),
    ("float16", [LARGEST, -LARGEST], "float16"),
    ("float16", [65519.0], "float16"),
    ("float16", [65520.0], "bfloat16"),
    ("float16", [0.0, -70000.0], "bfloat16"),
    ("float16", [3e38], "bfloat16"),
    ("float16", [0.0], "float16"),
    ("float16", [1e-7, -1e-6], "float16"),
    ("float16", [], "float16"),
    ("bfloat16", [1e30], "bfloat16"),
    ("float32", [1e30], "float32"),
]


@pytest.mark.parametrize(("name", "numbers", "expected"), CASES)
def test_finite_numbers_arrive_finite(name: str, numbers: list[float], expected: str) -> None:
    """The run's codec where it has room, else bfloat16; both take two bytes."""
    array = np.array(numbers, np.float32)

    chosen = RoomyCodec().choose(name, array, "gradients")

    assert chosen == expected
    assert np.isfinite(decode(encode(array, chosen), chosen, array.shape)).all()


def test_what_does_not_fit_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """By name and with its largest number, once for each kind of tensor; and what fades away."""
    roomy = RoomyCodec()
    for size in (81920.0, 90000.0):
        roomy.choose("float16", np.full(3, -size, np.float32), "hidden states after block 4")
    roomy.choose("float16", np.full(3, 3e-6, np.float32), "gradients")
    roomy.choose("float16", np.full(3, 1.0, np.float32), "gradients")

    assert [record.getMessage() for record in caplog.records] == [
        "float16.overflow what=hidden states after block 4 largest=8.192e+04 "
        "effect=such tensors travel in bfloat16",
        "float16.underflow what=gradients largest=3e-06 "
        "effect=it loses bits; set codec to bfloat16",
    ]
