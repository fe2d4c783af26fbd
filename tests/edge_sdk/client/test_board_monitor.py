"""What a board's signs of life tell of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.client.board_monitor import BoardMonitor
from tests.boards import build

SOON_S = 20.0


def soon(holds: Callable[[], bool]) -> bool:
    """Whether something holds before long."""
    until = time.monotonic() + SOON_S
    while not (found := holds()) and time.monotonic() < until:
        time.sleep(0.001)
    return found


def test_a_step_takes_time_and_energy(tmp_path: Path) -> None:
    """Means over the steps: 15.12 W for 10 s in five steps are 30.24 J and 2 s each."""
    now_s = [0.0]
    sources = build("xavier_nx_jp5", tmp_path).sources
    with BoardMonitor(sources, interval_s=0.001, clock=lambda: now_s[0]) as monitor:
        monitor.step()
        assert "step_time" not in monitor.telemetry()
        now_s[0] = 10.0
        assert soon(lambda: monitor.telemetry()["energy"] == pytest.approx(151.2))
        for _ in range(5):
            monitor.step()

        found = monitor.telemetry()

    assert found["step_time"] == pytest.approx(2.0)
    assert found["step_energy"] == pytest.approx(30.24)
    assert found["power"] == 15.12


def test_a_board_without_a_power_meter_tells_no_energy(tmp_path: Path) -> None:
    """Unknown is left out, never 0."""
    with BoardMonitor(build("container_v2", tmp_path).sources) as monitor:
        monitor.step()
        monitor.step()

        found = monitor.telemetry()

    assert found["step_time"] >= 0.0
    assert "step_energy" not in found


def test_another_power_mode_is_a_change_once(tmp_path: Path) -> None:
    """Whoever asks hears of it one time; nothing has changed before."""
    board = build("orin_nano_jp6", tmp_path)
    with BoardMonitor(board.sources, interval_s=0.001) as monitor:
        assert not monitor.take_change()
        board.write({"var/lib/nvpmodel/status": "pmode:0003 fmode:quiet\n"})

        assert soon(monitor.take_change)
        assert not monitor.take_change()
