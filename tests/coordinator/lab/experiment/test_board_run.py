"""A board in a run: what a restart keeps, when it comes, and where a program dials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.lab.experiment.board_host import BoardHost
from coordinator.lab.experiment.board_run import LONGEST_RESTART_S, BoardRun
from coordinator.lab.experiment.cgroup import CgroupLimits
from coordinator.lab.experiment.config import BoardConfig
from coordinator.lab.experiment.relay import Relay
from coordinator.lab.experiment.run import here
from coordinator.remote.shell import LocalShell
from edge_sdk.errors import DeviceError


class FakeLimits(CgroupLimits):
    """Groups that are not there; notes what they are told."""

    def __init__(self, told: list[float], *, is_gone: bool = False) -> None:
        self._told, self.is_gone = told, is_gone
        self.folders: list[Path] = []

    def set_cores(self, cores: float) -> None:
        """Note it."""
        if self.is_gone:
            raise FileNotFoundError("cpu.max")
        self._told.append(cores)

    def peak_bytes(self) -> None:
        """Nobody knows."""

    def num_killed(self) -> int:
        """None."""
        return 0

    def remove(self) -> None:
        """Do nothing."""


class FakeHost(BoardHost):
    """A board whose program is nothing."""

    def start(self, *_: Any) -> Any:
        """Do nothing."""


def board_run(told: list[float], **settings: Any) -> BoardRun:
    """A board with half a core."""
    host = FakeHost("a", BoardConfig(emulated="x"), LocalShell(), "/", "/", address="127.0.0.1")
    return BoardRun(host, make_limits=lambda: FakeLimits(told), cores=0.5, **settings)


def test_a_throttle_survives_a_restart() -> None:
    """Also one that began while no program ran; full speed comes with its end only."""
    told: list[float] = []
    board = board_run(told)
    board.slow_down(0.5)
    for now_s in (0.0, 1.0):
        board.start({}, Path(), print, now_s)
    board.slow_down(1.0)

    assert told == [0.25, 0.25, 0.5]


def test_a_throttle_of_groups_that_have_just_gone() -> None:
    """The program has ended and its supervisor was faster than we: nothing fails."""
    told: list[float] = []
    board = board_run(told, limits=FakeLimits(told, is_gone=True))

    board.slow_down(0.5)

    assert board.factor == 0.5


def test_restarts_back_off_and_begin_anew() -> None:
    """1 s, twice as long each time up to 60 s; after a life of more than that 1 s again."""
    board, waits = board_run([]), []

    def die(lived_s: float, now_s: float) -> float:
        board.start({}, Path(), print, now_s)
        board.plan_restart(-9, now_s + lived_s, 100)
        assert board.restart_at_s is not None
        waits.append(board.restart_at_s - now_s - lived_s)
        return board.restart_at_s

    now_s = 0.0
    for _ in range(8):
        now_s = die(1.0, now_s)
    die(LONGEST_RESTART_S + 1, now_s)

    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 1])


def test_a_start_without_limits_counts_as_a_death() -> None:
    """No group, no program, and an end that nobody knows."""
    board = board_run([])

    def refuse() -> CgroupLimits:
        raise DeviceError("no rights")

    board.make_limits = refuse
    with pytest.raises(DeviceError, match="no rights"):
        board.start({}, Path(), print, 0.0)

    assert (board.starts, board.exits, board.is_there) == (1, [None], False)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://0.0.0.0:7070", ("127.0.0.1", 7070)),
        ("tcp://[::]:7070", ("127.0.0.1", 7070)),
        ("tcp://127.0.0.1:5", ("127.0.0.1", 5)),
        ("tcp://10.0.0.2:7070", ("10.0.0.2", 7070)),
        ("tcp://[fe80::1]:7070", ("fe80::1", 7070)),
    ],
)
def test_where_the_coordinator_is_for_this_machine(address: str, expected: tuple[str, int]) -> None:
    """At the address it listens at, or at the loopback where it listens at all of them."""
    assert here(address) == expected


def test_a_relay_is_aimed_at_the_coordinator() -> None:
    """The board is told the relay's port."""
    with Relay() as relay:
        board = board_run([], relay=relay)

        assert board.address(("10.0.0.2", 7070)) == f"tcp://127.0.0.1:{relay.port}"
        assert relay._target == ("10.0.0.2", 7070)
