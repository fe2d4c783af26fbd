"""A link without a network, for tests and simulation: the same checks, limits and bytes.

Every message is encoded, cut into packets, and decoded again, so that what would fail on the wire
fails here, too. Not here: loss and reconnects, which applications never see.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

from edge_sdk.deadline import Deadline
from edge_sdk.errors import (
    LocalProtocolError,
    PeerGone,
    ReceiveTimeout,
    RemoteProtocolError,
    TransportError,
)
from edge_sdk.protocol import packets
from edge_sdk.protocol.codecs import Memories
from edge_sdk.protocol.fragments import Envelope, OutgoingMessage, TensorOut
from edge_sdk.protocol.messages import FROM_COORDINATOR, FROM_DEVICE
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.link import FLUSH_S, NO_TENSORS, LinkStats

_SESSION = "0" * 32


class MemoryLink:
    """One end of a pair; made by `memory_pair`."""

    def __init__(self, sends: tuple[type, ...], receives: tuple[type, ...], limit: int) -> None:
        self._sends = sends
        self._peer: MemoryLink | None = None
        # Never full: flow control is not simulated.
        self._out = Conversation(_SESSION, limit, sends, window_bytes=2**62)
        self._in = Conversation(_SESSION, limit, receives, window_bytes=2**62)
        self._memories: Memories = {}
        self._inbox: SimpleQueue[Envelope | TransportError | RemoteProtocolError] = SimpleQueue()
        self._bytes_up = 0
        self._bytes_down = 0
        self._is_closed = False

    def send(self, message: Any, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Encode *message* and give it to the other end, which has it at once."""
        if self._is_closed:
            raise LocalProtocolError("the link is closed")
        if not isinstance(message, self._sends):
            raise LocalProtocolError(f"{type(message).__name__} is not sent by this side")
        assert self._peer is not None
        if self._peer._is_closed:
            raise PeerGone("the other end is closed")
        outgoing = OutgoingMessage(message, tensors, memories=self._memories)
        lane = self._out.send(outgoing)
        sender = self._out.senders[lane]
        due = sender.peek(0.0)
        while due is not None:
            frame = bytes(self._out.frame(lane, due))
            self._bytes_up += len(frame)
            self._peer._take(frame)
            sender.sent(due)
            sender.on_ack(due.seq + 1, 0, 0.0)
            due = sender.peek(0.0)

    def _take(self, frame: bytes) -> None:
        self._bytes_down += len(frame)
        # A bytearray: what is received may be written to, as with the real link.
        for item in self._in.on_packet(packets.read_packet(memoryview(bytearray(frame)))):
            self._inbox.put(item if isinstance(item, Envelope) else RemoteProtocolError(item.text))

    def receive(self, deadline: Deadline) -> Envelope:
        """Return the next message; see `Link.receive`."""
        try:
            item = self._inbox.get(timeout=deadline.left_s())
        except queue.Empty:
            raise ReceiveTimeout("nothing arrived in time") from None
        if isinstance(item, Envelope):
            self._in.taken(item.lane, item.num_bytes)
            return item
        raise item

    def set_limit(self, max_message_bytes: int) -> None:
        """Change the payload in bytes that one received message may have."""
        self._in.set_limit(max_message_bytes)

    def stats(self) -> LinkStats:
        """Return what the link has done so far."""
        return LinkStats(self._bytes_up, self._bytes_down, 0, 0.0)

    def close(self, flush_s: float = FLUSH_S) -> None:
        """Close this end; the other end finds out after it has read what was sent."""
        if not self._is_closed:
            self._is_closed = True
            assert self._peer is not None
            self._peer._inbox.put(PeerGone("the other end is closed"))


def memory_pair(max_message_bytes: int = 64 * 1024 * 1024) -> tuple[MemoryLink, MemoryLink]:
    """Return a device's link and the coordinator's end of it."""
    device = MemoryLink(FROM_DEVICE, FROM_COORDINATOR, max_message_bytes)
    coordinator = MemoryLink(FROM_COORDINATOR, FROM_DEVICE, max_message_bytes)
    device._peer, coordinator._peer = coordinator, device
    return device, coordinator
