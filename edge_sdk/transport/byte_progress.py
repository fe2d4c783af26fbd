"""Whether bytes move in a TCP connection of libzmq's, which itself tells of whole frames only.

A chunk may take longer than any patience on a slow link. Linux knows what was received and what the
other end has acknowledged; elsewhere nothing is known, and whole frames have to do.
"""

from __future__ import annotations

from typing import NamedTuple

from edge_sdk.transport.descriptors import bytes_moved, bytes_unsent


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
        counts = None if self._descriptor is None else bytes_moved(self._descriptor)
        if counts is None or self._descriptor is None:
            return Moved(False, False)
        acked, received = counts
        is_full = bytes_unsent(self._descriptor) > 0
        moved = Moved(acked > self._acked and is_full, received > self._received)
        self._acked, self._received = acked, received
        return moved
