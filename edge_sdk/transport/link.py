"""What a client needs of a connection to its coordinator: the `Link` interface.

There are two: `ZmqLink` in `zmq_link.py`, and `MemoryLink` in `memory_link.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Protocol

from edge_sdk.deadline import Deadline
from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import Message
from edge_sdk.protocol.packets import MAX_CHUNK_BYTES
from edge_sdk.transport.keys import KeyPair

NO_TENSORS: Mapping[str, TensorOut] = MappingProxyType({})


# Seconds that `close` waits for the last acks.
FLUSH_S = 5.0


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What a link has done since it was opened."""

    bytes_up: int
    bytes_down: int
    reconnects: int
    rtt_s: float | None
    """Round trip of the last heartbeat, in seconds; None before the first."""


class Link(Protocol):
    """A connection of a client to its coordinator."""

    def send(self, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Queue *message*; it arrives once, in order, unless the session is lost.

        Into a lost session nothing is sent; `receive` says that it is lost.

        The arrays are borrowed until the coordinator has them: do not write to them again.
        """

    def receive(self, deadline: Deadline) -> Envelope:
        """Return the next message, or raise ReceiveTimeout, RefusedError, PeerGone, SessionLost."""

    def set_limit(self, max_message_bytes: int) -> None:
        """Change the payload in bytes that one received message may have."""

    def stats(self) -> LinkStats:
        """Return what the link has done so far."""

    def close(self, flush_s: float = FLUSH_S) -> None:
        """Send what is queued, for at most *flush_s* seconds, and end the session."""


def no_telemetry() -> dict[str, float]:
    """Return the telemetry of a device that has none."""
    return {}


@cache  # a file is read for it, and every Welcome names it
def package_version() -> str:
    """Return the version of this package, or `0` if it is not installed."""
    from importlib import metadata  # imported here, as it loads all of `email`

    try:
        return metadata.version("edgesplit")
    except metadata.PackageNotFoundError:
        return "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """Where the coordinator is and how patient the device is with it."""

    address: str
    """Address as ZeroMQ writes it: tcp://host:port."""
    server_key: str = ""
    """Public key of the coordinator; empty only for benchmarks without CURVE."""
    keys: KeyPair | None = None
    name: str = ""
    """Name of the device; only a coordinator without CURVE believes it."""
    max_message_bytes: int = 64 * 1024 * 1024
    """Largest payload in bytes of a received message; the application raises it as needed."""
    chunk_bytes: int = MAX_CHUNK_BYTES
    """Payload of one packet in bytes; 256 KiB on slow links."""
    first_contact_s: float = 10.0
    """Seconds until an unanswered first connect is reported."""
    patience_s: float = 600.0
    """Seconds without an answer until PeerGone is reported."""
    beat_s: float = 5.0
    """Seconds between heartbeats."""
    lifeless_s: float = 20.0
    """Seconds without any answer after which a connection is given up; more on a slow link."""
    reconnect_s: float = 0.5
    """Seconds before the first reconnect, or a little less; they double up to the longest."""
    reconnect_most_s: float = 3.0
    """Seconds between two reconnects at most."""
