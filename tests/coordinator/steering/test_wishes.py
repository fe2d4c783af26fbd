"""A wish is the same after its way through a line of bytes, and nothing else is one."""

from __future__ import annotations

import pytest

from coordinator.steering.wishes import MOST_BYTES, Kind, Wish, decode, encode


@pytest.mark.parametrize("kind", ["pause", "stop"])
@pytest.mark.parametrize("after_round", [False, True])
def test_a_wish_comes_through(kind: Kind, after_round: bool) -> None:
    """What is decoded is what was encoded, in a line that is short enough to be taken."""
    wish = Wish(kind, after_round)

    line = encode(wish)

    assert decode(line) == wish
    assert len(line) <= MOST_BYTES // 4


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\x00",
        b"pause",
        b"[]",
        b"{}",
        b'{"wish": "pause"}',
        b'{"wish": "kill", "after_round": false}',
        b'{"wish": "pause", "after_round": 1}',
        b'{"wish": ["pause"], "after_round": false}',
        b'{"wish": "pause", "after_round": false, "is_urgent": true}',
        b"[" * MOST_BYTES,
    ],
)
def test_nothing_else_is_a_wish(line: bytes) -> None:
    """A line that asks for nothing known is refused with a reason, whatever it holds."""
    with pytest.raises(ValueError, match="."):
        decode(line)
