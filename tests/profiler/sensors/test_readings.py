"""Readings: unknown is None."""

from __future__ import annotations

from profiler.sensors.readings import Reading, smallest, unknown


def test_the_smallest_known_reading_wins() -> None:
    """Unknown readings are passed over; 0 is a value like any other."""
    readings = [unknown("B"), Reading(3, "a", "B"), Reading(0, "b", "B")]

    assert smallest(readings, "B") == Reading(0, "b", "B")
    assert smallest([unknown("B")], "B") == Reading(None, "unknown", "B")
