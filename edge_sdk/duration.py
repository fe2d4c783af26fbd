"""Lengths of time as people say them. What is measured in other units is said where it is."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return *seconds* in two units at most: `0.3 s`, `45 s`, `1 min 30 s`, `3 h 05 min`, `2 days`.

    Every program and every file says times so, but for numbers in columns of one unit.
    """
    whole = round(seconds)
    if 0 < seconds < 0.95:
        return f"{seconds:.1g} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} days"
