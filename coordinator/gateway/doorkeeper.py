"""The connections of the coordinator's port: who is a stranger yet, what each holds, who must go.

libzmq takes every connection, bounds neither their number nor the memory of one, and closes none
when we want that. So we count what it takes, and shut the connection of whoever has too much; it
finds the end and frees what it held. Used by the I/O thread alone. Not here: sessions and messages
(`io_thread.py`).
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from coordinator.gateway.ration import Bucket, Trouble, source_of
from edge_sdk.transport.descriptors import bytes_moved, hang_up, peer_of
from edge_sdk.transport.sockets import frame_property, monitor_events

# Connections that have proven no key yet, each for 5 s at most (`sockets.HANDSHAKE_MS`); one too
# many costs whoever has most of them its oldest. A fleet of 60 behind one address fits in.
MOST_STRANGERS = 256
MOST_STRANGERS_EACH = 128
# A handshake takes less than 2 KiB, and a device says where it belongs before it says more.
MOST_GREETING_BYTES = 16 * 1024
# Seconds for a first frame after the keys were accepted.
GREETING_S = 10.0
# Seconds that a connection of a registered key may belong to no session, and how many may.
IDLE_S = 30.0
MOST_EACH = 8
# Frames of a connection without a session that are answered: what was on its way when it ended.
MOST_LOOSE = 256
# Bytes of a connection that libzmq may hold, each way: credit allows a quarter of it.
MOST_HELD_BYTES = 16 * 1024 * 1024
# Control frames and packets out of turn are answered or read whatever the credit: so many at once,
# and a second. A device at 10 Gbit/s acks a thousand times a second; other frames are dearer.
MOST_FRAMES, FRAMES_PER_S = 4000.0, 2000.0
CHEAP, DEAR = 1.0, 20.0
# The kernel is asked this often what has arrived: of all strangers, and of so many connections of
# devices, in turn. Of 1,000 devices each is looked at every 0.8 s.
LOOK_S = 0.1
MOST_LOOKS = 256
# Of the descriptors that are left when the port opens, the run keeps this share for its files.
FILES_SHARE = 4
LEAST_CONNECTIONS = 8

_MONITORED = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


def wire_bytes(num_bytes: int) -> int:
    """Return what a frame takes on the wire: CURVE adds 33 bytes, ZMTP two or nine."""
    sealed = num_bytes + 33
    return sealed + (2 if sealed < 256 else 9)


@dataclass(slots=True, eq=False)
class PortConnection:
    """One connection to the port."""

    descriptor: int
    peer: tuple[str, int]
    source: str
    """Whom it counts for while it is a stranger."""
    since_s: float
    """Since when it has neither been accepted nor belonged to a session."""
    name: str = ""
    """The device whose key it has proven; empty for a stranger."""
    num_lanes: int = 0
    """Lanes of live sessions that it carries."""
    num_loose: int = 0
    taken_bytes: int = 0
    """What we have had of it, as on the wire."""
    given_bytes: int = 0
    """What libzmq was given for it, as on the wire."""
    is_shut: bool = False
    budget: Bucket = field(default_factory=lambda: Bucket(MOST_FRAMES, FRAMES_PER_S))


class Caller(NamedTuple):
    """Who has sent a frame, and by which connection."""

    route: bytes
    name: str
    """Name of its key; empty where that is not registered any more, and without CURVE."""
    key: str
    """Public key; empty without CURVE."""
    frame: zmq.Frame
    connection: PortConnection | None
    """None where libzmq does not tell."""

    @property
    def address(self) -> str:
        """Return where it comes from."""
        return frame_property(self.frame, "Peer-Address").removeprefix("::ffff:")


def fault_of(
    connection: PortConnection, received_bytes: int, acked_bytes: int, now_s: float
) -> str | None:
    """Return why a connection must be shut; None if it need not."""
    age_s = now_s - connection.since_s
    if not connection.name:
        if received_bytes > MOST_GREETING_BYTES:
            return f"{received_bytes} bytes before its key was proven"
        return "no word after the handshake" if age_s > GREETING_S else None
    if received_bytes - connection.taken_bytes > MOST_HELD_BYTES:
        return f"{received_bytes - connection.taken_bytes} bytes that make no packet"
    if connection.given_bytes - acked_bytes > MOST_HELD_BYTES:
        return f"{connection.given_bytes - acked_bytes} bytes that it does not take"
    if not connection.num_lanes and age_s > IDLE_S:
        return "no session"
    return None


class Doorkeeper:
    """Knows all connections of a socket that listens."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], trouble: Trouble
    ) -> None:
        self.trouble = trouble
        self.most_connections = _most_connections()
        self.connections: dict[int, PortConnection] = {}
        self._strangers: dict[str, dict[PortConnection, None]] = {}
        self._num_strangers = 0
        self._devices: dict[str, dict[PortConnection, None]] = {}
        self._router = router
        self.shut_now: list[tuple[PortConnection, str]] = []
        """Connections that carried sessions and were shut, and why; the reader empties it."""
        self._look_s = 0.0
        self._unseen: list[PortConnection] = []
        """Connections of devices that have yet to be looked at before the first one is again."""
        address = f"inproc://doorkeeper-{secrets.token_hex(8)}"
        router.monitor(address, _MONITORED)
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.linger = 0
        # Without a limit, as libzmq would wait for us else, and we may wait for it.
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        self.monitor.connect(address)

    def close(self) -> None:
        """Watch no more; before the router is closed."""
        self._router.disable_monitor()
        self.monitor.close()

    # -- who comes and goes --

    def news(self, now_s: float) -> None:
        """Take note of connections that were made and have ended."""
        for event, descriptor in monitor_events(self.monitor):
            if event == zmq.EVENT_ACCEPTED:
                self._accepted(descriptor, now_s)
            else:
                self._gone(descriptor)

    def _accepted(self, descriptor: int, now_s: float) -> None:
        self._gone(descriptor)
        peer = peer_of(descriptor)
        if peer is None:  # gone already, or not of TCP
            return
        connection = PortConnection(descriptor, peer, source_of(peer[0]), now_s)
        self.connections[descriptor] = connection
        self._strangers.setdefault(connection.source, {})[connection] = None
        self._num_strangers += 1
        self._make_room(connection, now_s)

    def _make_room(self, newest: PortConnection, now_s: float) -> None:
        """Shut the oldest stranger of whoever has most of them if there are too many."""
        most = min(MOST_STRANGERS, max(LEAST_CONNECTIONS, self.most_connections // 2))
        own = self._strangers[newest.source]
        if len(own) > min(most, MOST_STRANGERS_EACH):
            self.shut(next(iter(own)), "too many handshakes at once", now_s)
        elif self._num_strangers > most or len(self.connections) > self.most_connections:
            largest = max(self._strangers.values(), key=len)
            self.shut(next(iter(largest)), "too many handshakes at once", now_s)

    def _gone(self, descriptor: int) -> None:
        connection = self.connections.pop(descriptor, None)
        if connection is not None:
            self._unlist(connection)

    def _unlist(self, connection: PortConnection) -> None:
        if connection.name:
            table, key = self._devices, connection.name
        else:
            table, key = self._strangers, connection.source
        same = table.get(key, {})
        if connection in same:
            del same[connection]
            self._num_strangers -= not connection.name
            if not same:
                del table[key]

    # -- what they send and are sent --

    def of(self, frame: zmq.Frame) -> PortConnection | None:
        """Return the connection of a frame; None where it has ended, or libzmq does not tell."""
        try:
            return self.connections.get(int(frame.get(zmq.SRCFD)))
        except (zmq.ZMQError, ValueError):
            return None

    def proven(self, connection: PortConnection, name: str, now_s: float) -> None:
        """Note that the key of a connection is that of a device; it may have few of them."""
        if connection.name == name:
            return
        self._unlist(connection)
        connection.name, connection.since_s = name, now_s
        same = self._devices.setdefault(name, {})
        same[connection] = None
        if len(same) > MOST_EACH:
            idle = [other for other in same if not other.num_lanes]
            self.shut(idle[0], "too many connections of its key", now_s)

    def loose(self, connection: PortConnection | None, now_s: float) -> bool:
        """Note a frame without a session; return whether to answer it."""
        if connection is None:
            return True
        connection.num_loose += 1
        if connection.num_loose > MOST_LOOSE:
            self.shut(connection, "too many frames without a session", now_s)
        return not connection.is_shut

    def affords(self, connection: PortConnection | None, cost: float, now_s: float) -> bool:
        """Return whether a frame that no credit bounds is within the budget; else shut."""
        if connection is None or connection.budget.take(cost, now_s):
            return True
        self.shut(connection, "more frames than any device needs", now_s)
        return False

    def carry(self, connection: PortConnection | None, by: int, now_s: float) -> None:
        """Note that a connection carries a lane more, or one less."""
        if connection is not None:
            connection.num_lanes += by
            connection.num_loose, connection.since_s = 0, now_s

    def shut(self, connection: PortConnection | None, reason: str, now_s: float) -> None:
        """End a connection; libzmq is told of it by the kernel, and tells us."""
        if connection is None or connection.is_shut:
            return
        connection.is_shut = True
        self._unlist(connection)
        if connection.num_lanes:
            self.shut_now.append((connection, reason))
        if hang_up(connection.descriptor, connection.peer):
            source = connection.name or connection.source
            self.trouble.tell("connection.shut", source, f"reason={reason}", now_s)

    # -- the clock --

    def next_s(self, latest_s: float) -> float:
        """Return when to look again: at *latest_s*, or before."""
        return min(latest_s, self._look_s) if self.connections else latest_s

    def look(self, now_s: float) -> None:
        """Shut who holds too much or stays too long."""
        if now_s < self._look_s:
            return
        self._look_s = now_s + LOOK_S
        for connection in self._looked_at():
            if connection.is_shut or self.connections.get(connection.descriptor) is not connection:
                continue
            counts = bytes_moved(connection.descriptor)
            received, acked = (0, 1 << 62) if counts is None else (counts.received, counts.acked)
            reason = fault_of(connection, received, acked, now_s)
            if reason is not None:
                self.shut(connection, reason, now_s)

    def _looked_at(self) -> list[PortConnection]:
        """Return all strangers, and the devices' connections whose turn it is."""
        if not self._unseen:
            self._unseen = [each for each in self.connections.values() if each.name]
        turn, self._unseen = self._unseen[:MOST_LOOKS], self._unseen[MOST_LOOKS:]
        return [*(each for own in self._strangers.values() for each in own), *turn]

    def tell(self, now_s: float) -> None:
        """Log what was only counted, and that there are no descriptors left if there are none."""
        self.trouble.sum_up(now_s)
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                text = f"{len(self.connections)} connections, no descriptors left: ulimit -n"
                self.trouble.tell("gateway.full", "", text, now_s)


def _most_connections() -> int:
    """Return how many connections leave the run enough descriptors for its files."""
    import resource  # what has no such limits does not have it

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return 1 << 30
    used = 64
    with suppress(OSError):
        used = len(os.listdir("/proc/self/fd"))
    left = max(0, limit - used)
    return max(LEAST_CONNECTIONS, left - left // FILES_SHARE)
