"""What systemd is told while it holds the coordinator as a service of `Type=notify`.

One datagram a message, to the socket that `NOTIFY_SOCKET` names: sd_notify(3) without its library.
Without that variable nobody is told anything.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundStarted
from coordinator.results.events.run import (
    Exported,
    Listening,
    Preparing,
    RunFinished,
    RunStarted,
    StopAsked,
)
from coordinator.results.lifecycle import COMPLETED

log = logging.getLogger(__name__)

# No event loop turns while a result is written, or where devices take no part: a day.
UNWATCHED = f"WATCHDOG_USEC={24 * 3600 * 10**6}"
# Signs of life in the time within which systemd expects one.
SIGNS = 4


class ServiceManager:
    """Tells systemd that devices can connect, and that the event loop turns: a watcher."""

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._clock = _address(environment.get("NOTIFY_SOCKET", "")), clock
        self._every_s = watchdog_s(environment, os.getpid()) / SIGNS
        self._next_s = float("-inf")
        self._is_ready = False

    def see(self, event: RunEvent) -> None:
        """Say what *event* means to a service manager, if anything."""
        match event:
            case Preparing(what):
                self._tell(f"STATUS={_line(what)}")
            case Listening(folder, address):
                self._is_ready = True
                self._tell("READY=1", f"STATUS={_line(f'run {folder.name} listens at {address}')}")
            case RunStarted() if not self._is_ready:  # a run without devices: nobody can connect
                self._tell("READY=1", UNWATCHED)
            case RoundStarted():
                self._tell(f"STATUS=round {event.nth} with {len(event.devices)} devices")
            case StopAsked(is_urgent=True):  # it gives us some seconds from now on
                self._tell("STOPPING=1", "STATUS=stopping")
            case StopAsked():
                self._tell(f"STATUS={_line(event.text)}")
            case RunFinished(outcome) if outcome == COMPLETED:
                self._tell(UNWATCHED, "STATUS=writing the result")
            case Exported():
                self._tell("STATUS=complete")

    def turn(self) -> None:
        """Give a sign of life, where one is due."""
        now_s = self._clock()
        if self._every_s and now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)  # the run waits for nobody who only looks on
                out.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.info("service_manager.untold reason=%s", error.strerror or error)


def watchdog_s(environment: Mapping[str, str], pid: int) -> float:
    """Return the seconds within which process *pid* is to give a sign of life; 0: none is due."""
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0  # meant for the process that started us
    text = environment.get("WATCHDOG_USEC", "")
    return int(text) / 10**6 if text.isascii() and text.isdigit() else 0.0


def _address(text: str) -> str:
    """Return a socket's address as the system takes it: `@` begins the name of an abstract one."""
    if text.startswith("@"):
        return f"\0{text[1:]}"
    return text if text.startswith("/") else ""


def _line(text: str) -> str:
    return " ".join(text.split())
