"""What the gateway keeps for each device that has a session: plain data, no sockets.

A session belongs to a name, and the name to a key; routing ids only say where to send, never who
it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.gateway.interface import DeviceStats
from edge_sdk.protocol.codecs import Memories
from edge_sdk.protocol.session import Conversation


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
    memories: Memories = field(default_factory=dict)
    """What the codecs know of the tensors sent; used by the thread that sends."""

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
