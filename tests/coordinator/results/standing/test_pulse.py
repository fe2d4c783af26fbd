"""A folder shows whether its coordinator is ready and alive, and what else it is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from coordinator.results.events.run import Listening, RunFinished
from coordinator.results.lifecycle import COMPLETED
from coordinator.results.run_lock import locked
from coordinator.results.standing.live_file import LiveFile
from coordinator.results.standing.pulse import (
    FINISHING,
    LISTENING,
    STARTING,
    LoopPulse,
    feel,
    illness,
)


def test_a_run_is_followed_from_its_start_to_its_end(tmp_path: Path) -> None:
    """It comes up, listens, and writes its result; then nobody holds it."""
    live, phases = LiveFile(), []
    with locked(tmp_path):
        phases.append(feel(tmp_path, time.time()).phase)
        live.see(Listening(tmp_path, "tcp://*:1"))
        phases.append(feel(tmp_path, time.time()).phase)
        live.see(RunFinished(COMPLETED))
        phases.append(feel(tmp_path, time.time()).phase)
        assert feel(tmp_path, time.time()).is_held

    assert phases == [STARTING, LISTENING, FINISHING]
    assert not feel(tmp_path, time.time()).is_held


def test_a_loop_that_turns_keeps_the_file_young(tmp_path: Path) -> None:
    """Also where nothing happens, and when somebody has taken the file away."""
    clock = iter(range(100))
    live = LiveFile(lambda: float(next(clock)))
    live.see(Listening(tmp_path, "tcp://*:1"))
    os.utime(tmp_path / "live.json", (1.0, 1.0))
    old = feel(tmp_path, time.time()).age_s

    live.turn()
    young = feel(tmp_path, time.time())
    (tmp_path / "live.json").unlink()
    live.turn()

    assert old > 1e6
    assert young.age_s < 60
    assert feel(tmp_path, time.time()).phase == LISTENING


@pytest.mark.parametrize(
    ("pulse", "ready", "alive"),
    [
        (LoopPulse(True, LISTENING, 1.0), "", ""),
        (LoopPulse(True, LISTENING, 61.0), "not turned for 61 s", "not turned for 61 s"),
        (LoopPulse(True, STARTING, float("inf")), "does not listen yet", ""),
        (LoopPulse(True, FINISHING, 900.0), "rounds are over", ""),
        (LoopPulse(False, LISTENING, 1.0), "no coordinator holds it", "no coordinator holds it"),
    ],
)
def test_ready_is_more_than_alive(pulse: LoopPulse, ready: str, alive: str) -> None:
    """Whoever only comes up, or writes its result, need not be started again."""
    for expected, is_enough in ((ready, False), (alive, True)):
        found = illness(pulse, 60.0, is_live_enough=is_enough)

        assert expected in found
        assert bool(found) == bool(expected)


def test_a_file_that_says_nothing_is_no_pulse(tmp_path: Path) -> None:
    """Half a line, or a list, is as good as none."""
    for text in ("{", "[]"):
        (tmp_path / "live.json").write_text(text)

        assert feel(tmp_path, time.time()).phase == STARTING
