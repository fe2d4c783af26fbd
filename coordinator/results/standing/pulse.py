"""Whether a run is ready for devices, and whether its event loop turns: read from its folder.

`LiveFile` writes what is read here. A file's time is the clock's, so a clock that is set leaves one
wrong answer behind it, until the loop has turned again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from coordinator.results.run_folder import LIVE
from coordinator.results.run_lock import is_held

STARTING, LISTENING, FINISHING = "starting", "listening", "finishing"
"""What a coordinator does: it comes up, devices can connect, the result is being written."""


@dataclass(frozen=True)
class LoopPulse:
    """A run's coordinator, as its folder shows it."""

    is_held: bool
    """Whether a process holds the run."""
    phase: str
    age_s: float
    """Since the event loop turned; infinity where it never has."""


def feel(folder: Path, now_s: float) -> LoopPulse:
    """Return the pulse of the run in *folder*; *now_s* is the time of the clock."""
    path = folder / LIVE
    try:
        found = json.loads(path.read_bytes())
        age_s = max(0.0, now_s - path.stat().st_mtime)
    except (OSError, ValueError):
        return LoopPulse(is_held(folder), STARTING, float("inf"))
    phase = found.get("phase", STARTING) if isinstance(found, dict) else STARTING
    return LoopPulse(is_held(folder), str(phase), age_s)


def illness(pulse: LoopPulse, within_s: float, *, is_live_enough: bool) -> str:
    """Return what is wrong, in a few words; empty where nothing is.

    Args:
        pulse: What the folder shows.
        within_s: Seconds within which the event loop turns.
        is_live_enough: Whether it need not listen: one that comes up, or writes its result, is
            alive.
    """
    if not pulse.is_held:
        return "no coordinator holds it"
    if pulse.phase == LISTENING and pulse.age_s > within_s:
        return f"its event loop has not turned for {pulse.age_s:.0f} s"
    if is_live_enough or pulse.phase == LISTENING:
        return ""
    if pulse.phase == FINISHING:
        return "its rounds are over"
    return "it does not listen yet"
