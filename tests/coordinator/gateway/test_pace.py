"""How far apart the turns of the gateway's thread are."""

from __future__ import annotations

import pytest

from coordinator.gateway import pace
from coordinator.gateway.pace import EACH_S, MOST_S, Pace


class Clock:
    """Stands in for the module `time`: sleeping takes just as long as it is meant to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass; what is no time is not slept."""
        assert seconds > 0
        self.now_s += seconds


@pytest.mark.parametrize(
    ("num_sessions", "apart_s"),
    [(0, 0.0), (1, 0.0), (10, 9 * EACH_S), (1_000, MOST_S), (100_000, MOST_S)],
)
def test_turns_are_apart_and_never_late(
    num_sessions: int, apart_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns that follow at once are so far apart; one that comes later does not wait at all."""
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    turns = Pace()
    turns.wait(num_sessions)
    began_s = clock.now_s
    for _ in range(3):
        turns.wait(num_sessions)
    assert clock.now_s - began_s == pytest.approx(3 * apart_s)

    clock.now_s += MOST_S
    later_s = clock.now_s
    turns.wait(num_sessions)
    assert clock.now_s == later_s
