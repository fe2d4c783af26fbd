"""What has arrived at the coordinator's port, frame by frame: from whom, and by which connection.

Not here: what frames mean (`io_thread.py`). Used by the I/O thread alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import zmq

from coordinator.gateway.doorkeeper import Caller, Doorkeeper, wire_bytes
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_desk import EnrolDesk
from edge_sdk.transport.sockets import frame_property


@dataclass(slots=True)
class Inlet:
    """Reads the frames of a socket that listens."""

    router: zmq.Socket[bytes]
    door: Doorkeeper
    allowed: AllowList | None
    """None without CURVE."""
    desk: EnrolDesk | None = None
    """Answers whoever is not registered and has an enrolment code."""

    def read(self, now_s: float) -> Caller | None:
        """Return what was sent, and by whom; None if that is to be ignored.

        Raises:
            zmq.Again: Nothing waits.
        """
        route = self.router.recv(zmq.NOBLOCK)
        frame = self.router.recv(zmq.NOBLOCK, copy=False)
        assert isinstance(frame, zmq.Frame)
        is_whole = not frame.more
        while not is_whole and self.router.getsockopt(zmq.RCVMORE):
            self.router.recv(zmq.NOBLOCK)
        connection = self.door.of(frame)
        if connection is None:
            self.door.news(now_s)
            connection = self.door.of(frame)
        if connection is not None:
            connection.taken_bytes += wire_bytes(len(frame))
        if not is_whole:  # no device sends that, and to read it takes time
            self.door.shut(connection, "a message in several parts", now_s)
            return None
        if connection is not None and connection.is_shut:
            return None
        name = key = ""
        if self.allowed is not None:
            key = frame_property(frame, "User-Id")
            name = self.allowed.name_of(key) or ""
            if not name and self.allowed.is_closed:  # who it is will be known later
                return None
        if connection is not None and (name or self.allowed is None):
            self.door.proven(connection, name or str(connection.peer), now_s)
        caller = Caller(route, name, key, frame, connection)
        if not name and self.desk is not None and self.desk.takes(caller, now_s):
            return None
        return caller
