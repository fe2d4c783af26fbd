"""Values as people read them."""

from __future__ import annotations

import pytest

from profiler.sensors.readings import Fact, Reading, amount, no_fact, unknown


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (Reading(1536 * 2**20, "x", "B"), "1,536 MiB"),
        (Reading(0, "x", "B"), "0 MiB"),
        (Reading(918e6, "x", "Hz"), "918 MHz"),
        (Reading(2.6e9, "x", "Hz"), "2.6 GHz"),
        (Reading(3.21e12, "x", "FLOP/s"), "3.21 TFLOP/s"),
        (Reading(0.0123, "x", "s"), "12.3 ms"),
        (Reading(12.0, "x", "s"), "12 s"),
        (Reading(11.92, "x", "W"), "11.9 W"),
        (Reading(0.5, "x", "cores"), "0.5 cores"),
        (Reading(31417, "x", "events"), "31417 events"),
        (Fact(True, "x"), "yes"),
        (Fact(False, "x"), "no"),
        (Fact("8.7", "x"), "8.7"),
        (unknown("W"), "unknown"),
        (no_fact(), "unknown"),
    ],
)
def test_an_amount_has_a_unit_that_fits_it(known: Reading | Fact, expected: str) -> None:
    """Memory in MiB, rates in thousands of their unit; unknown is a word and no number."""
    assert amount(known) == expected
