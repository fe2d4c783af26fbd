"""What the gateway keeps for each device that has a session; plain data and events.

Not here: sockets (`io_thread.py`). A seat belongs to a name, which belongs to a key; routing ids
only say where to send, never who it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.session import Conversation


@dataclass(frozen=True, slots=True)
class Joined:
    """A device has opened a session; its Hello follows."""

    device: str
    session: str


@dataclass(frozen=True, slots=True)
class Received:
    """A message has arrived."""

    device: str
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Rejected:
    """A device sent something the protocol forbids; it has been told."""

    device: str
    error: str


@dataclass(frozen=True, slots=True)
class Silent:
    """Nothing has been heard of a device for that long; it may come back."""

    device: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    """The session of a device is over."""

    device: str
    reason: str = ""


Event = Joined | Received | Rejected | Silent | Left


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """What is known about a device's connection."""

    session: str
    bytes_up: int
    bytes_down: int
    reconnects: int
    rtt_s: float | None
    """As the device measured it; None before its second heartbeat."""
    heard_s: float
    """Last sign of life, on this machine's monotonic clock."""
    telemetry: dict[str, float]
    """Numbers of the last heartbeat."""


@dataclass(slots=True, eq=False)
class DeviceSession:
    """One session. Used by the I/O thread; others only read."""

    name: str
    talk: Conversation
    heard_s: float
    routes: list[bytes | None] = field(default_factory=lambda: [None, None])
    telemetry: dict[str, float] = field(default_factory=dict)
    rtt_s: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    reconnects: int = 0
    num_bad: int = 0
    silent_s: float = 0.0
    """Silence that was last reported; 0 while the device speaks."""
    is_over: bool = False
    leave: tuple[str, float] | None = None
    """To be dropped for this reason when all is sent, at that time at the latest."""

    def stats(self) -> DeviceStats:
        """Return what others may know."""
        return DeviceStats(
            self.talk.session,
            self.bytes_up,
            self.bytes_down,
            self.reconnects,
            self.rtt_s,
            self.heard_s,
            dict(self.telemetry),
        )


def is_session_id(text: str) -> bool:
    """Whether *text* is 32 hexadecimal digits, as every session is called."""
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)
