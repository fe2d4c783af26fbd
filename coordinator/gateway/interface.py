"""What the coordinator needs of its connections to devices: the `Gateway` interface and its events.

There are two: `ZmqGateway` in `gateway.py` and, without a network, `SimulatedGateway` in
`coordinator/lab/simulation/gateway.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import Message
from edge_sdk.transport.link import NO_TENSORS


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


@dataclass(frozen=True, slots=True)
class Registered:
    """The key of a device was registered, in exchange for an enrolment code."""

    device: str
    key: str
    address: str


Event = Joined | Received | Rejected | Silent | Left | Registered


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """What is known about a device's connection."""

    session: str
    bytes_up: int
    bytes_down: int
    reconnects: int
    rtt_s: float | None
    """Round trip in seconds as the device measured it; None before its second heartbeat."""
    heard_s: float
    """Time of the last sign of life, on this machine's monotonic clock."""
    telemetry: dict[str, float]
    """Numbers of the last heartbeat."""
    num_moved: int
    """Packets of messages, in both directions, that have reached the other side."""
    queued_bytes: int = 0
    """What was sent to the device and is not confirmed as a whole message."""
    traffic: Mapping[str, int] = field(default_factory=dict)
    """Bytes of messages by kind, as `traffic.py` names them."""


class Gateway(Protocol):
    """The sessions of all devices."""

    @property
    def address(self) -> str:
        """Where devices connect, as ZeroMQ writes it."""

    def devices(self) -> list[str]:
        """Return the names of all devices with a session, sorted."""

    def stats(self, device: str) -> DeviceStats:
        """Return what is known about the connection of *device*, its telemetry included.

        Raises:
            PeerGone: The device has no session.
        """

    def events(self, timeout_s: float) -> list[Event]:
        """Return what has happened, waiting at most *timeout_s* for the first event.

        One thread calls this. An empty list means that nothing happened, or that `wake` was called.

        Raises:
            TransportError: The gateway itself has failed.
        """

    def send(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Queue *message* for *device*; any thread may call this.

        The arrays are borrowed until the device has them: do not write to them again.

        Raises:
            PeerGone: The device has no session.
        """

    def set_limits(self, device: str, max_message_bytes: int) -> None:
        """Change the payload in bytes that one message of *device* may have.

        Raises:
            PeerGone: The device has no session.
        """

    def drop(self, device: str, reason: str) -> None:
        """Send *device* what is queued for it, then end its session; it is told why.

        From now on nothing that comes from this session is an event, but that it has left.

        Raises:
            PeerGone: The device has no session.
        """

    def forget(self, device: str, reason: str) -> None:
        """End the session of *device* at once, as if it had never been: the device greets anew.

        Raises:
            PeerGone: The device has no session.
        """

    def wake(self) -> None:
        """Make `events` return now; any thread may call this."""

    def close(self) -> None:
        """End all sessions at once."""
