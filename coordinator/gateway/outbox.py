"""What leaves the coordinator: packets of the sessions that have some, acks, and control frames.

Not here: what arrives, and sessions (`io_thread.py`). Used by the I/O thread alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import zmq

from coordinator.gateway.doorkeeper import wire_bytes
from coordinator.gateway.sessions import DeviceSession
from edge_sdk.protocol import packets
from edge_sdk.protocol.packets import Lane
from edge_sdk.transport.sockets import ZERO_COPY_BYTES

# An ack may wait this long for others; it is well below any round trip that matters.
ACK_DELAY_S = 0.002
# libzmq does not say when a ROUTER's peer has room again.
RETRY_FULL_S = 0.005
# A closing coordinator tries this long to get its last acks out.
FAREWELL_MS = 200
# Added up once: flags are enumerations, and adding two of them takes longer than to queue a frame.
_MORE = int(zmq.SNDMORE | zmq.NOBLOCK)
# A device is sent so many packets in a row before the others have their turn.
TURN_PACKETS = 8


@dataclass(slots=True)
class Outbox:
    """Who has something to be sent, and how it is sent."""

    router: zmq.Socket[bytes]
    _ready: dict[DeviceSession, None] = field(default_factory=dict)
    _owing: dict[DeviceSession, None] = field(default_factory=dict)
    _ack_s: float = 0.0
    _full: dict[DeviceSession, None] = field(default_factory=dict)
    _full_s: float = 0.0

    def add(self, session: DeviceSession) -> None:
        """Note that something may be sent to *session*."""
        self._ready[session] = None

    def forget(self, session: DeviceSession) -> None:
        """Drop a session that is over."""
        for pending in (self._ready, self._owing, self._full):
            pending.pop(session, None)

    def next_s(self, latest_s: float) -> float:
        """Return when there is something to do: at *latest_s*, or before."""
        if self._ready:
            return 0.0
        if self._owing:
            latest_s = min(latest_s, self._ack_s)
        return min(latest_s, self._full_s) if self._full else latest_s

    def pump(self, now_s: float) -> None:
        """Send what may be sent now, a few packets per session, and the acks that are due."""
        if self._full and now_s >= self._full_s:
            self._ready.update(self._full)
            self._full.clear()
        for session in list(self._ready):
            if not (self._pump_lane(session, 0, now_s) | self._pump_lane(session, 1, now_s)):
                self._ready.pop(session, None)
        if self._owing and now_s >= self._ack_s:
            for session in self._owing:
                self.ack(session)
            self._owing.clear()

    def farewell(self) -> None:
        """Ack what has arrived before the socket closes, so that nobody waits for it in vain."""
        for session in self._owing:
            self.ack(session)
        self.router.linger = FAREWELL_MS

    def _pump_lane(self, session: DeviceSession, lane: int, now_s: float) -> bool:
        """Send some packets of a lane; return whether there may be more to send right now."""
        sender = session.talk.senders[lane]
        for _ in range(TURN_PACKETS):
            due = sender.peek(now_s) if session.route_to(lane) is not None else None
            if due is None:
                return False
            frame = session.talk.frame(lane, due)
            if not self._put(session, lane, frame, now_s):
                return False
            sender.sent(due)
        return True

    def _put(self, session: DeviceSession, lane: int, frame: Any, now_s: float) -> bool:
        route = session.route_to(lane)
        if route is None:
            return False
        try:
            self.router.send(route, _MORE)
            self.router.send(frame, zmq.NOBLOCK, copy=len(frame) < ZERO_COPY_BYTES)
        except zmq.Again:
            if not self._full:
                self._full_s = now_s + RETRY_FULL_S
            self._full[session] = None
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            session.deaf_lanes.add(lane)  # gone; it will attach again
            return False
        session.bytes_down += len(frame)
        connection = session.connections[lane]
        if connection is not None:
            connection.given_bytes += wire_bytes(len(frame))
        return True

    def say(self, route: bytes, control: Any, lane: int = Lane.CONTROL, tag: int = 0) -> bool:
        """Send a control frame to a connection, whether or not it has a session."""
        return self._say(route, packets.control_frame(control, lane, tag)) == 0

    def _say(self, route: bytes, frame: bytes) -> int:
        """Send a frame; return 0, EAGAIN where there is no room, EHOSTUNREACH where nobody is."""
        try:
            self.router.send(route, _MORE)
            self.router.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return error.errno
        return 0

    def ask(self, session: DeviceSession) -> bool:
        """Ask a device for a sign of life; return whether it has a connection that we know of."""
        frame = packets.control_frame(packets.AttachRequired(), Lane.CONTROL, session.talk.tag)
        for lane in Lane:
            route = session.route_to(lane)
            if route is not None and self._say(route, frame) == zmq.EHOSTUNREACH:
                session.deaf_lanes.add(lane)
        return any(session.route_to(lane) is not None for lane in Lane)

    def control(self, session: DeviceSession, control: Any) -> bool:
        """Send a control frame on the control lane of a session."""
        route = session.route_to(Lane.CONTROL)
        return route is not None and self.say(route, control, Lane.CONTROL, session.talk.tag)

    def ack(self, session: DeviceSession) -> None:
        """Tell a device what has arrived, if that is news."""
        if session.talk.owes_ack and not self.control(session, session.talk.ack()):
            session.talk.ack_failed()  # the next packet tries again, or else the regular check

    def owe(self, session: DeviceSession, now_s: float) -> None:
        """Ack what has arrived or was taken: at once if that is due, else a little later."""
        if session.is_over:
            return
        if session.talk.is_ack_due:
            self._owing.pop(session, None)
            self.ack(session)
        else:
            if not self._owing:
                self._ack_s = now_s + ACK_DELAY_S
            self._owing[session] = None
