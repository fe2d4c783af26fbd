"""What the gateway keeps for each device that has a session: plain data, no sockets.

A session belongs to a name, and the name to a key; routing ids only say where to send, never who
it is.
"""

from __future__ import annotations

import heapq
import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from coordinator.gateway.doorkeeper import Caller, PortConnection
from coordinator.gateway.interface import DeviceStats
from coordinator.gateway.ration import Bucket
from coordinator.gateway.traffic import Traffic
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.codecs import Memories
from edge_sdk.protocol.fragments import OutgoingMessage
from edge_sdk.protocol.messages import Failure, Stamp
from edge_sdk.protocol.packets import Attach, Closed, Heartbeat, UnknownSession
from edge_sdk.protocol.session import Conversation

# So many ended sessions are remembered.
MAX_ENDED = 4096
# A heartbeat carries about 20 numbers.
MOST_NUMBERS = 64
_NUMBER_NAME = re.compile(r"[a-z][a-z0-9_.]{0,31}")
# Sessions that a key may open at once, and in a second; who breaks the protocol loses so many.
MOST_SESSIONS, SESSIONS_PER_S, FAULT_COSTS = 60.0, 0.5, 15.0


@dataclass(slots=True)
class Rival:
    """Another session of a name that is taken, while it is not known whether the first one lives.

    It may be the same device, started again, whose death nobody has noticed yet; or another board
    with a copy of its key.
    """

    until_s: float
    """Time at which the first session has lost its name, if it has not answered."""
    attaches: dict[int, tuple[Caller, Attach]] = field(default_factory=dict)
    """Its connections by lane."""


@dataclass(slots=True, eq=False)
class DeviceSession:
    """One session; the I/O thread changes it, others only read."""

    name: str
    key: str
    address: str
    """Where its first connection came from."""
    talk: Conversation
    joined_s: float
    heard_s: float
    routes: list[bytes | None] = field(default_factory=lambda: [None, None])
    """Where its lanes come from: the last connections that were attached."""
    deaf_lanes: set[int] = field(default_factory=set)
    """Lanes on which nobody is there to be sent to; what has come of them may yet be read."""
    connections: list[PortConnection | None] = field(default_factory=lambda: [None, None])
    """Those that carry its lanes, or did; None where libzmq does not tell."""
    telemetry: dict[str, float] = field(default_factory=dict)
    rtt_s: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    reconnects: int = 0
    num_bad: int = 0
    silent_s: float = 0.0
    """Seconds of silence that were last reported; 0 while the device speaks."""
    is_over: bool = False
    is_dropped: bool = False
    """Whether the coordinator wants to hear nothing of it any more; set by its other threads."""
    leave: tuple[str, float] | None = None
    """Reason for which it ends when all is sent, and the time at which it ends at the latest."""
    rival: Rival | None = None
    traffic: Traffic = field(default_factory=Traffic)
    memories: Memories = field(default_factory=dict)
    """What the codecs know of the tensors sent; used by the thread that sends."""

    @property
    def id(self) -> str:
        """The name that the device gave the session: 32 hexadecimal digits."""
        return self.talk.session

    def route_to(self, lane: int) -> bytes | None:
        """Return where to send on a lane; None where nobody is there."""
        return None if lane in self.deaf_lanes else self.routes[lane]

    def heard(self, now_s: float) -> None:
        """Note a sign of life."""
        self.heard_s = now_s
        self.silent_s = 0.0

    def take_numbers(self, beat: Heartbeat) -> None:
        """Keep what a heartbeat tells of its device."""
        self.telemetry = clean_numbers(beat.numbers)
        self.rtt_s = beat.rtt_s or None

    def excuse(self, late_s: float, now_s: float) -> None:
        """Blame it for nothing that was not heard while we did not listen."""
        self.heard_s = min(now_s, self.heard_s + late_s)
        for sender in self.talk.senders:
            sender.excuse(now_s)

    def complaint(self, text: str) -> OutgoingMessage:
        """Return the message by which its device learns what was wrong with one of its own."""
        stamp, error = Stamp(device=self.name), RemoteProtocolError.__name__
        return OutgoingMessage(Failure(stamp=stamp, error=error, text=text), {})

    def why_not_another(self, now_s: float) -> str:
        """Say since when and from where its device is connected, to another one with its key."""
        age_s = now_s - self.joined_s
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - age_s))
        return (
            f"another device with this key is connected from {self.address} since {since}"
            f" ({age_s:.0f} s ago), and lives: a key belongs to one device, give this one its own"
        )

    def stats(self) -> DeviceStats:
        """Return what others may know."""
        return DeviceStats(
            self.id,
            self.bytes_up,
            self.bytes_down,
            self.reconnects,
            self.rtt_s,
            self.heard_s,
            dict(self.telemetry),
            self.talk.num_moved,
            self.talk.queued_bytes,
            self.traffic.counts(),
        )


@dataclass(slots=True)
class EndedSessions:
    """The latest sessions that are over: a late packet of one must not replace its successor."""

    _reasons: OrderedDict[str, str | None] = field(default_factory=OrderedDict)

    def remember(self, session: str, reason: str | None) -> None:
        """Note why a session is over; None if its device may begin another one."""
        self._reasons[session] = reason
        if len(self._reasons) > MAX_ENDED:
            self._reasons.popitem(last=False)

    def answer(self, session: str) -> Closed | UnknownSession | None:
        """Return what to say to whoever attaches to *session*; None if it is not over."""
        if session not in self._reasons:
            return None
        reason = self._reasons[session]
        if reason is None:
            return UnknownSession(session=session)
        return Closed(session=session, reason=reason)


@dataclass(slots=True)
class SessionBudgets:
    """Sessions that each key may still open, so that nobody comes back faster than it is judged."""

    _buckets: dict[str, Bucket] = field(default_factory=dict)

    def take(self, name: str, amount: float, now_s: float) -> bool:
        """Take *amount* of what the key of *name* has left; return whether there was any."""
        bucket = self._buckets.setdefault(name, Bucket(MOST_SESSIONS, SESSIONS_PER_S))
        return bucket.take(amount, now_s)


@dataclass(slots=True)
class Schedule:
    """When to look at which session."""

    _heap: list[tuple[float, int, DeviceSession]] = field(default_factory=list)
    _count: int = 0

    def add(self, at_s: float, session: DeviceSession) -> None:
        """Look at *session* at *at_s*."""
        self._count += 1  # breaks ties, sessions have no order
        heapq.heappush(self._heap, (at_s, self._count, session))

    def due(self, now_s: float) -> Iterator[DeviceSession]:
        """Yield those that are to be looked at now, unless they are over."""
        while self._heap and self._heap[0][0] <= now_s:
            session = heapq.heappop(self._heap)[2]
            if not session.is_over:
                yield session


def clean_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Return the telemetry of a heartbeat as far as it looks like ours: it is written to files."""
    few = islice(numbers.items(), MOST_NUMBERS)
    return {name: number for name, number in few if _NUMBER_NAME.fullmatch(name)}


def is_session_id(text: str) -> bool:
    """Return whether *text* is 32 hexadecimal digits, as the id of every session."""
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)
