"""Which fault begins and ends when. Pure: the clock is an argument.

`run.py` does to a board what a fault says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from coordinator.lab.experiment.config import FaultConfig


class FaultsDue(NamedTuple):
    """A fault that begins or ends now."""

    fault: FaultConfig
    begins: bool


class FaultSchedule:
    """Faults that are still to come, and those that have yet to end."""

    def __init__(self, faults: Sequence[FaultConfig]) -> None:
        self._waiting = list(faults)
        self._ends: list[tuple[float, FaultConfig]] = []

    def due(self, now_s: float, steps: Mapping[str, int]) -> list[FaultsDue]:
        """Return what begins and ends until *now_s*, each once.

        Args:
            now_s: Seconds since the boards were started.
            steps: Steps of the run that each board has finished.
        """
        due = [FaultsDue(fault, begins=False) for end_s, fault in self._ends if end_s <= now_s]
        self._ends = [(end_s, fault) for end_s, fault in self._ends if end_s > now_s]
        begun = [fault for fault in self._waiting if _has_come(fault, now_s, steps)]
        self._waiting = [fault for fault in self._waiting if fault not in begun]
        for fault in begun:
            due.append(FaultsDue(fault, begins=True))
            # A cut ends by itself, to the millisecond.
            if fault.seconds is not None and fault.do != "cut":
                self._ends.append((now_s + fault.seconds, fault))
        return due

    def brings_back(self, board: str) -> bool:
        """Return whether a fault that ends will start the board's program again."""
        return any(f.board == board and f.do in ("kill", "power-cut") for _, f in self._ends)


def _has_come(fault: FaultConfig, now_s: float, steps: Mapping[str, int]) -> bool:
    if fault.at_s is not None:
        return now_s >= fault.at_s
    assert fault.at_step is not None
    return steps.get(fault.board, 0) >= fault.at_step
