"""How a value is written for people: an amount with a unit that fits it, or `unknown`."""

from __future__ import annotations

from profiler.readings import Fact, Reading

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
