"""The link of a device to its coordinator, as an application sees it.

Not here: sockets and reconnects (`io_thread.py`, `connection.py`), bytes (`protocol/headers.py`),
the link for tests and simulation (`memory_link.py`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError, LocalProtocolError, ReceiveTimeout, SessionLost
from edge_sdk.protocol.codecs import Memories
from edge_sdk.protocol.fragments import Envelope, OutgoingMessage, TensorOut
from edge_sdk.protocol.messages import FROM_DEVICE, Message
from edge_sdk.protocol.packets import MAX_CHUNK_BYTES
from edge_sdk.transport.io_thread import DeviceIo
from edge_sdk.transport.link import (
    FLUSH_S,
    NO_TENSORS,
    LinkConfig,
    LinkStats,
    no_telemetry,
    package_version,
)


class ZmqLink(AbstractContextManager["ZmqLink"]):
    """A link over ZeroMQ with CURVE; reconnects by itself.

    Use as a context manager, or call `close`. *telemetry* is called in the I/O thread before each
    heartbeat: it must be quick and must not raise.
    """

    def __init__(
        self, config: LinkConfig, telemetry: Callable[[], dict[str, float]] = no_telemetry
    ) -> None:
        if not 0 < config.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes must be 1 .. {MAX_CHUNK_BYTES}: {config.chunk_bytes}")
        self._io = DeviceIo(config, telemetry, package_version())
        self._epoch = 0  # number of sessions that the application knows to be lost
        self._memories: Memories = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._io.run, name="edgesplit-link", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The device's name as the coordinator registered its key; empty before the answer."""
        return self._io.name

    def send(self, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Queue *message*; see `Link.send`. Any thread may call this."""
        if not isinstance(message, FROM_DEVICE):
            raise LocalProtocolError(f"{type(message).__name__} is not a message of a device")
        if self._is_closed:
            raise LocalProtocolError("the link is closed")
        if self._io.dead is not None:
            if not self._io.inbox.empty():
                return  # why it is over is told by what came before, which `receive` has yet to say
            raise self._io.dead
        size = self._io.config.chunk_bytes
        # In a session that is lost meanwhile it is dropped, and `receive` says when that was.
        self._io.post("send", self._epoch, OutgoingMessage(message, tensors, size, self._memories))

    def receive(self, deadline: Deadline) -> Envelope:
        """Return the next message; see `Link.receive`."""
        if self._io.dead is not None and self._io.inbox.empty():
            raise self._io.dead
        try:
            epoch, item = self._io.inbox.get(timeout=deadline.left_s())
        except queue.Empty:
            raise ReceiveTimeout("nothing arrived in time") from None
        if isinstance(item, Envelope):
            self._io.took(epoch, item)
            return item
        if item is None:
            raise self._over()
        if isinstance(item, SessionLost):
            self._epoch, self._memories = epoch + 1, {}
        self._io.has_error_posted = False
        raise item

    def _over(self) -> EdgeError:
        self._io.inbox.put((self._epoch, None))  # for whoever else is waiting
        return LocalProtocolError("the link is closed")

    def set_limit(self, max_message_bytes: int) -> None:
        """Change the payload in bytes that one received message may have."""
        self._io.post("limit", self._epoch, max_message_bytes)

    def stats(self) -> LinkStats:
        """Return what the link has done so far."""
        counters = self._io.counters
        return LinkStats(
            counters.bytes_up, counters.bytes_down, counters.reconnects, counters.rtt_s
        )

    def close(self, flush_s: float = FLUSH_S) -> None:
        """Send what is queued, for at most *flush_s* seconds, and end the session."""
        if not self._is_closed:
            self._is_closed = True
            self._io.post("close", 0, flush_s)
            self._thread.join()
            self._io.waker.close()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close(flush_s=FLUSH_S if error is None else 0.0)
