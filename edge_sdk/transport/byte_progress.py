"""Whether bytes move in a TCP connection of libzmq's, which itself tells of whole frames only.

A chunk may take longer than any patience on a slow link. Linux knows what was received and what the
other end has acknowledged; elsewhere nothing is known, and whole frames have to do.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from contextlib import suppress
from typing import NamedTuple

# struct tcp_info, linux/tcp.h: bytes acknowledged and received since the connection was made.
_ACKED_AND_RECEIVED = struct.Struct("=120xQQ")
_QUEUED = struct.Struct("=i")


class Moved(NamedTuple):
    """Which way bytes have moved."""

    up: bool
    down: bool


class ByteProgress:
    """One connection, by the number of its descriptor; libzmq may close it at any time."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._acked = self._received = 0

    def connected(self, descriptor: int) -> None:
        """Watch another connection."""
        self._descriptor, self._acked, self._received = descriptor, 0, 0

    def disconnected(self) -> None:
        """Watch none."""
        self._descriptor = None

    def look(self) -> Moved:
        """Return what has moved since the last look.

        Upwards counts only what has left a queue that is not empty: a middlebox that acknowledges
        and throws away takes everything at once, a slow link keeps us waiting.
        """
        counts = None if self._descriptor is None else _read(self._descriptor)
        if counts is None:
            return Moved(False, False)
        acked, received, queued = counts
        moved = Moved(acked > self._acked and queued > 0, received > self._received)
        self._acked, self._received = acked, received
        return moved


def _read(descriptor: int) -> tuple[int, int, int] | None:
    """Return bytes acknowledged, received and queued; None where that is not known."""
    if sys.platform != "linux":
        return None
    with suppress(OSError, struct.error):  # closed meanwhile, or an older kernel
        watched = socket.socket(fileno=descriptor)
        try:
            info = watched.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AND_RECEIVED.size)
        finally:
            watched.detach()  # it is libzmq's to close
        acked, received = _ACKED_AND_RECEIVED.unpack(info)
        queued = _QUEUED.unpack(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(_QUEUED.size)))[0]
        return acked, received, queued
    return None
