"""Times are said alike everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.duration import duration

TIMES = {
    "0 s": 0.0,
    "0.3 s": 0.3,
    "1 s": 0.96,
    "59 s": 59.4,
    "1 min": 59.6,
    "1 min 30 s": 90.0,
    "12 min": 725.0,
    "1 h 00 min": 3599.7,
    "3 h 05 min": 11_100.0,
    "47 h 59 min": 48 * 3600 - 1.0,
    "2 days": 200_000.0,
}


@pytest.mark.parametrize(("words", "seconds"), TIMES.items())
def test_two_units_at_most(words: str, seconds: float) -> None:
    """The larger the time, the larger its units; what rounds up to one is said as one."""
    assert duration(seconds) == words


@given(st.floats(0, 1e7), st.floats(0, 1e7))
def test_a_longer_time_is_not_said_as_a_shorter_one(one: float, other: float) -> None:
    """What is said, read back in seconds, grows with what is meant."""
    scale = {"s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}

    def read(text: str) -> float:
        words = text.split()
        return sum(float(n) * scale[u] for n, u in zip(words[::2], words[1::2], strict=True))

    low, high = sorted((one, other))
    assert read(duration(low)) <= read(duration(high))
