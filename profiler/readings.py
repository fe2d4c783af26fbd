"""What a measurement is: a value, its unit, and where it came from.

Unknown is None and never 0: a board that cannot tell its temperature is not at 0 degrees.
"""

from __future__ import annotations

from typing import NamedTuple


class Reading(NamedTuple):
    """One measured value and where it came from."""

    value: float | None
    """None where no source knows."""
    source: str
    """File, call or limit that the value was read from; `unknown` where there is none."""
    unit: str
    """`B`, `s`, `W`, `Hz`, `C`, `cores` ..."""


class MemoryInfo(NamedTuple):
    """Memory that this process could use, in bytes; a container's limit counts, not the host's."""

    total: Reading
    available: Reading


def unknown(unit: str) -> Reading:
    """Return the reading of a quantity that nothing here can tell."""
    return Reading(None, "unknown", unit)


def smallest(readings: list[Reading], unit: str) -> Reading:
    """Return the smallest known reading: whichever limit binds first."""
    known = [reading for reading in readings if reading.value is not None]
    return min(known, key=lambda reading: reading.value or 0.0) if known else unknown(unit)
