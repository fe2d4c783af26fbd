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
    """`B`, `s`, `W`, `J`, `Hz`, `C`, `%`, `cores`, `FLOP/s` ..."""
    estimated: bool = False
    """Whether the value is only close to what it is called, such as the sum of some rails."""


class Fact(NamedTuple):
    """One fact or name, and where it was read."""

    value: str | bool | None
    """None where no source knows."""
    source: str


class MemoryInfo(NamedTuple):
    """Memory that this process could use, in bytes; a container's limit counts, not the host's."""

    total: Reading
    available: Reading


NOT_KNOWN = "unknown"


def unknown(unit: str) -> Reading:
    """Return the reading of a quantity that nothing here can tell."""
    return Reading(None, NOT_KNOWN, unit)


def no_fact() -> Fact:
    """Return the fact that nothing here can tell."""
    return Fact(None, NOT_KNOWN)


def smallest(readings: list[Reading], unit: str) -> Reading:
    """Return the smallest known reading: whichever limit binds first."""
    known = [reading for reading in readings if reading.value is not None]
    return min(known, key=lambda reading: reading.value or 0.0) if known else unknown(unit)


PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Units that grow by thousands; all others are written as they are.
SCALED = ("Hz", "FLOP/s", "B/s", "J")


def amount(known: Reading | Fact) -> str:
    """Return the value for a person to read."""
    value = known.value
    if value is None:
        return "unknown"
    if isinstance(known, Reading):
        return _number(known.value or 0.0, known.unit)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _number(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:,.0f} MiB"
    if unit == "s" and value < 1:
        return f"{1000 * value:.3g} ms"
    if unit in SCALED:
        for factor, prefix in PREFIXES:
            if value >= factor:
                return f"{value / factor:.3g} {prefix}{unit}"
    if unit in ("W", "J", "C", "%"):
        return f"{value:.1f} {unit}"
    return f"{value:g} {unit}"
