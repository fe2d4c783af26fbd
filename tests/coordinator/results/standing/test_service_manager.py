"""systemd is told what sd_notify(3) says, over a real socket; where there is none, nothing is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.results.events.rounds import RoundStarted
from coordinator.results.events.run import (
    Exported,
    Listening,
    Preparing,
    RunFinished,
    RunPaused,
    RunStarted,
    StopAsked,
)
from coordinator.results.lifecycle import COMPLETED, PAUSED
from coordinator.results.standing.service_manager import UNWATCHED, ServiceManager, watchdog_s


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(0.0)
        yield made


def messages(heard: socket.socket) -> list[list[str]]:
    """Return what has come so far, a list of lines for each datagram."""
    found = []
    while True:
        try:
            found.append(heard.recv(4096).decode().splitlines())
        except BlockingIOError:
            return found


def manager(path: str, **more: str) -> ServiceManager:
    """Return a manager that hears at *path*."""
    return ServiceManager({"NOTIFY_SOCKET": path, **more})


def test_ready_is_said_when_devices_can_connect(heard: socket.socket, tmp_path: Path) -> None:
    """Nothing before that counts as ready; a stop is said when it is asked for."""
    told = manager(str(tmp_path / "notify"))

    told.see(Preparing("reading model x"))
    told.see(Listening(tmp_path / "run", "tcp://*:7070"))
    told.see(RunStarted("r", 0))
    told.see(RoundStarted(0, 1, ["a", "b"], {}))
    told.see(StopAsked())
    told.see(RunFinished(PAUSED))
    told.see(RunPaused(tmp_path / "run"))

    assert messages(heard) == [
        ["STATUS=reading model x"],
        ["READY=1", "STATUS=run run listens at tcp://*:7070"],
        ["STATUS=round 1 with 2 devices"],
        ["STOPPING=1", "STATUS=stopping"],
    ]


def test_nobody_watches_while_a_result_is_written(heard: socket.socket, tmp_path: Path) -> None:
    """No event loop turns then; nor in a run without devices, which is ready when it trains."""
    told = manager(str(tmp_path / "notify"))

    told.see(RunStarted("pooled", 0))
    told.see(RunFinished(COMPLETED))
    told.see(Exported("adapter", 0.0))

    assert messages(heard) == [
        ["READY=1", UNWATCHED],
        [UNWATCHED, "STATUS=writing the result"],
        ["STATUS=complete"],
    ]


def test_signs_of_life_come_four_times_in_the_time_they_are_due(
    heard: socket.socket, tmp_path: Path
) -> None:
    """However often the loop turns; without WATCHDOG_USEC none is sent."""
    now = [0.0]
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "8000000"}
    told = ServiceManager(environment, lambda: now[0])
    silent = manager(str(tmp_path / "notify"))

    for _ in range(80):
        told.turn()
        silent.turn()
        now[0] += 0.1

    assert messages(heard) == [["WATCHDOG=1"]] * 4


def test_an_abstract_socket_is_reached() -> None:
    """Its name begins with @, as in containers of systemd."""
    name = f"edgesplit-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0{name}")
        heard.settimeout(5.0)

        manager(f"@{name}").see(Preparing("x"))

        assert heard.recv(100) == b"STATUS=x"


@pytest.mark.parametrize("path", ["", "/nowhere/notify", "vsock:2:1234"])
def test_a_manager_that_cannot_be_reached_ends_nothing(path: str) -> None:
    """The run goes on without it."""
    told = manager(path, WATCHDOG_USEC="1000000")

    told.see(Preparing("x"))
    told.turn()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, 0.0),
        ({"WATCHDOG_USEC": "-1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdog_may_be_meant_for_another_process(
    environment: dict[str, str], seconds: float
) -> None:
    """What is inherited from a parent that is watched itself does not count; nor does nonsense."""
    assert watchdog_s(environment, 7) == seconds
