"""The ear of a run that goes on: a local socket that its owner alone can open, in its folder.

A thread of its own listens, so that nobody who calls can hold the run up. It takes few callers at a
time, few bytes of each, and each for a short time until it has said what it wants.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from coordinator.results.run_folder import SOCKET
from coordinator.steering.socket_path import socket_path
from coordinator.steering.wishes import MOST_BYTES, Wish, decode
from edge_sdk.files import PRIVATE

log = logging.getLogger(__name__)

# Shells that wait for an answer at the same time; one more is turned away.
MOST_CALLERS = 8
# Seconds that a caller has to say what it wants.
SAY_S = 5.0
# Seconds between two calls that are taken: whoever calls without end costs next to nothing.
BETWEEN_S = 0.01


@dataclass
class _Caller:
    """Somebody who has called."""

    until_s: float
    """When it must have said what it wants; never again once it has."""
    said: bytes = b""


class Listener:
    """Takes wishes for a run, and answers when they are fulfilled. Use as a context manager.

    Args:
        folder: The run's folder, which this process holds.
        ask: Takes a wish, in any thread, and returns at once; an answer is a reason to refuse it.
    """

    def __init__(self, folder: Path, ask: Callable[[Wish], str | None]) -> None:
        self._folder, self._ask = folder, ask
        self._callers: dict[socket.socket, _Caller] = {}
        self._last_words: dict[str, str] | None = None
        self._waker, self._woken = socket.socketpair()
        self._ear: socket.socket | None = None
        self._thread = threading.Thread(target=self._listen, name="steering", daemon=True)

    def __enter__(self) -> Listener:
        """Begin to listen; a run whose folder can hold no socket goes on without."""
        self._ear = self._open()
        if self._ear is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._end(None)

    def answer(self, outcome: str) -> None:
        """Tell everybody who waits how the run has ended; nobody is listened to any more."""
        self._end({"outcome": outcome})

    def _end(self, last_words: dict[str, str] | None) -> None:
        if self._ear is None:
            return
        self._last_words = last_words
        self._waker.close()  # which the thread hears
        self._thread.join()
        self._ear = None

    def _open(self) -> socket.socket | None:
        ear = socket.socket(socket.AF_UNIX)
        try:
            with socket_path(self._folder) as path:
                with suppress(FileNotFoundError):
                    os.unlink(path)  # of a process that was killed: this one holds the run
                ear.bind(path)
                os.chmod(path, PRIVATE)
            ear.listen(MOST_CALLERS)
        except OSError as error:
            ear.close()
            log.warning("steering.absent folder=%s reason=%s", self._folder, error.strerror)
            return None
        ear.setblocking(False)
        return ear

    # ---- the thread ----

    def _listen(self) -> None:
        assert self._ear is not None
        with self._ear as ear, selectors.DefaultSelector() as selector, self._woken as woken:
            selector.register(woken, selectors.EVENT_READ)
            selector.register(ear, selectors.EVENT_READ)
            is_over = False
            while not is_over:
                for key, _ in selector.select(self._left_s()):
                    if key.fileobj is woken:
                        is_over = True
                    elif key.fileobj is ear:
                        self._welcome(ear, selector)
                    elif isinstance(key.fileobj, socket.socket):
                        self._hear(key.fileobj, selector)
                self._part_with_the_silent(selector)
            for caller in list(self._callers):
                if self._last_words is not None and not self._callers[caller].said:
                    _tell(caller, self._last_words)
                self._part(caller, selector)
            with suppress(OSError):
                (self._folder / SOCKET).unlink()

    def _left_s(self) -> float | None:
        """Return the seconds until somebody has been silent for too long; None: nobody can be."""
        times = [caller.until_s for caller in self._callers.values()]
        first_s = min(times, default=float("inf"))
        return None if first_s == float("inf") else max(0.0, first_s - time.monotonic())

    def _welcome(self, ear: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            caller, _ = ear.accept()
        except OSError:  # gone again, or no descriptor is left
            time.sleep(BETWEEN_S)
            return
        caller.setblocking(False)
        time.sleep(BETWEEN_S)
        if len(self._callers) >= MOST_CALLERS or not _is_owner(caller):
            caller.close()
            return
        self._callers[caller] = _Caller(time.monotonic() + SAY_S)
        selector.register(caller, selectors.EVENT_READ)

    def _hear(self, caller: socket.socket, selector: selectors.BaseSelector) -> None:
        mine = self._callers[caller]
        try:
            heard = caller.recv(MOST_BYTES)
        except OSError:
            heard = b""
        has_asked = mine.until_s == float("inf")
        if not heard or has_asked:  # it has gone, or says more than its wish
            self._part(caller, selector)
            return
        mine.said += heard
        line, end, _ = mine.said.partition(b"\n")
        if not end and len(mine.said) < MOST_BYTES:
            return
        try:
            wish = decode(line[:MOST_BYTES])
        except ValueError as error:
            refusal: str | None = str(error)
        else:
            refusal = self._ask(wish)
        if refusal is not None:
            _tell(caller, {"refused": refusal})
            self._part(caller, selector)
            return
        mine.said, mine.until_s = b"", float("inf")
        _tell(caller, {"asked": wish.kind})

    def _part_with_the_silent(self, selector: selectors.BaseSelector) -> None:
        now_s = time.monotonic()
        for caller in [c for c, mine in self._callers.items() if mine.until_s <= now_s]:
            self._part(caller, selector)

    def _part(self, caller: socket.socket, selector: selectors.BaseSelector) -> None:
        del self._callers[caller]
        selector.unregister(caller)
        caller.close()


def _tell(caller: socket.socket, words: dict[str, str]) -> None:
    """Send a line; it is far shorter than what a new socket takes without waiting."""
    with suppress(OSError):
        caller.send(json.dumps(words).encode() + b"\n")


def _is_owner(caller: socket.socket) -> bool:
    """Return whether the kernel says that a caller is of our user, or root.

    Where it says nothing, the permissions of the socket have to do.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    format_ = "3i"
    found = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(format_))
    _, user, _ = struct.unpack(format_, found)
    return user in (0, os.geteuid())
