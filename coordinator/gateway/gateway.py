"""The coordinator's only door: every device's messages come in and go out here.

One I/O thread owns the socket (`io_thread.py`); the rest of the coordinator reads events and
queues messages. Not here: what the messages mean.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue

import zmq

from coordinator.gateway.doorkeeper import Doorkeeper
from coordinator.gateway.inlet import Inlet
from coordinator.gateway.interface import DeviceStats, Event, Left, Received
from coordinator.gateway.io_thread import GatewayIo
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from coordinator.gateway.keys.enrolment_desk import EnrolDesk
from coordinator.gateway.keys.refused_keys import RefusedKeys
from coordinator.gateway.keys.zap import ZAP_DOMAIN, ZapHandler
from coordinator.gateway.outbox import Outbox
from coordinator.gateway.ration import Trouble
from coordinator.gateway.sessions import DeviceSession
from edge_sdk.errors import ConfigError, LocalProtocolError, PeerGone, TransportError
from edge_sdk.protocol.channel import ACK_EVERY_BYTES
from edge_sdk.protocol.fragments import OutgoingMessage, TensorOut
from edge_sdk.protocol.messages import FROM_COORDINATOR, Message
from edge_sdk.protocol.packets import MAX_CHUNK_BYTES
from edge_sdk.transport.keys import KeyPair
from edge_sdk.transport.link import NO_TENSORS
from edge_sdk.transport.sockets import tune

# `events` takes no further batch once it has so many events, so that its caller's loop comes round.
MAX_EVENTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Where the coordinator listens, and how patient it is."""

    address: str = "tcp://*:5555"
    """As ZeroMQ writes it; port `*` takes a free one."""
    keys: KeyPair | None = None
    insecure: bool = False
    """No encryption and no keys; for benchmarks on one machine only."""
    max_message_bytes: int = 1024 * 1024
    """Largest payload in bytes of a message from a device for which `set_limits` was not called."""
    chunk_bytes: int = MAX_CHUNK_BYTES
    """Payload of one packet in bytes; 256 KiB on slow links."""
    silent_after_s: float = 30.0
    """Seconds without a sign of life before Silent; reported again each time it has doubled."""
    gone_after_s: float = 900.0
    """Seconds without a sign of life before the session is forgotten with Left; half-way there the
    device is asked for one, so that this may be less than the time between two heartbeats."""


class ZmqGateway(AbstractContextManager["ZmqGateway"]):
    """The `Gateway` over ZeroMQ with CURVE. Use as a context manager, or call `close`."""

    def __init__(self, config: GatewayConfig, allowed: AllowList | None = None) -> None:
        if not config.insecure and (config.keys is None or allowed is None):
            raise ConfigError("gateway: keys and an allow-list are needed unless insecure=True")
        self._config = config
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # A connection costs a descriptor; libzmq's own limit of 1023 sockets does not count them.
        zap = door = book = desk = None
        trouble = Trouble()
        router = self._context.socket(zmq.ROUTER)
        try:
            tune(router)
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else messages vanish without an error
            router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # else a reconnected peer is deaf
            router.setsockopt(zmq.BACKLOG, 1024)
            if not config.insecure:
                assert config.keys is not None
                assert allowed is not None
                book, refused = EnrolmentBook(allowed.path), RefusedKeys(allowed.path)
                zap = ZapHandler(self._context, allowed, trouble, book, refused)
                _lock(router, config.keys)
            door = Doorkeeper(self._context, router, trouble)
            self.address = _bind(router, config.address)
        except BaseException:
            if door is not None:
                door.close()
            router.close()
            if zap is not None:
                zap.close()
            self._context.term()
            raise
        events: SimpleQueue[list[tuple[DeviceSession | None, Event]]] = SimpleQueue()
        out = Outbox(router)
        if book is not None and allowed is not None:
            desk = EnrolDesk(book, allowed, door, out.say, lambda e: events.put([(None, e)]))
        self._io = GatewayIo(
            Inlet(router, door, None if config.insecure else allowed, desk),
            out,
            door,
            zap,
            None if config.insecure else allowed,
            config.max_message_bytes,
            config.silent_after_s,
            config.gone_after_s,
            events,
        )
        self._taken: dict[DeviceSession, list[tuple[int, int]]] = {}
        self._taken_bytes = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._io.run, name="gateway", daemon=True)
        self._thread.start()

    def devices(self) -> list[str]:
        """Return the names of all devices with a session; see `Gateway`."""
        return sorted(list(self._io.sessions))

    def stats(self, device: str) -> DeviceStats:
        """Return what is known about a connection; see `Gateway`."""
        return self._session(device).stats()

    def events(self, timeout_s: float) -> list[Event]:
        """Return what has happened; see `Gateway`."""
        events: list[Event] = []
        try:
            batch = self._io.events.get(timeout=max(0.0, timeout_s))
            while batch:
                for session, event in batch:
                    if session is not None and session.is_dropped and not isinstance(event, Left):
                        continue
                    if isinstance(event, Received) and session is not None:
                        self._took(session, event)
                    events.append(event)
                if len(events) >= MAX_EVENTS:
                    break
                batch = self._io.events.get_nowait()
        except queue.Empty:
            pass
        if not events and self._io.failure:
            self._io.events.put([])  # the next caller is told as well
            raise TransportError(f"the gateway has failed: {self._io.failure}")
        self._return_credit()
        return events

    def _took(self, session: DeviceSession, event: Received) -> None:
        envelope = event.envelope
        session.traffic.add(envelope.message, envelope.num_bytes)
        self._taken.setdefault(session, []).append((envelope.lane, envelope.num_bytes))
        self._taken_bytes += envelope.num_bytes

    def _return_credit(self) -> None:
        """Tell the I/O thread what has been taken; wake it only when that opens a window."""
        if not self._taken:
            return
        for session, taken in self._taken.items():
            self._io.commands.append(("taken", session, taken))
        self._taken = {}
        if self._taken_bytes >= ACK_EVERY_BYTES:
            self._taken_bytes = 0
            self._io.waker.wake()

    def send(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Queue *message* for *device*; see `Gateway`."""
        if not isinstance(message, FROM_COORDINATOR):
            raise LocalProtocolError(f"{type(message).__name__} is not a coordinator's message")
        session, size = self._session(device), self._config.chunk_bytes
        outgoing = OutgoingMessage(message, tensors, size, session.memories)
        session.traffic.add(message, outgoing.total + len(outgoing.head))
        self._io.post("send", session, outgoing)

    def set_limits(self, device: str, max_message_bytes: int) -> None:
        """Change the size that a message of *device* may have; see `Gateway`."""
        self._io.post("limit", self._session(device), max_message_bytes)

    def drop(self, device: str, reason: str) -> None:
        """End the session of *device* when all is sent; see `Gateway`."""
        session = self._session(device)
        session.is_dropped = True
        self._io.post("drop", session, reason or "dropped")

    def forget(self, device: str, reason: str) -> None:
        """End the session of *device* so that it greets anew; see `Gateway`."""
        session = self._session(device)
        session.is_dropped = True
        self._io.post("forget", session, reason)

    def wake(self) -> None:
        """Make `events` return now; see `Gateway`."""
        self._io.events.put([])

    def _session(self, device: str) -> DeviceSession:
        session = self._io.sessions.get(device)
        if session is None:
            raise PeerGone(f"device {device!r} has no session")
        return session

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once; devices keep trying, and find out from the next coordinator."""
        if not self._is_closed:
            self._is_closed = True
            self._io.is_closing = True
            self._io.waker.wake()
            self._thread.join()
            self._io.waker.close()
            self._context.term()


def _lock(router: zmq.Socket[bytes], keys: KeyPair) -> None:
    router.curve_server = True
    router.curve_secretkey = keys.secret.encode()
    router.curve_publickey = keys.public.encode()
    router.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN.encode())
    router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else no handler lets everyone in


def _bind(router: zmq.Socket[bytes], address: str) -> str:
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot listen at {address}: {error}") from error
    # An IPv4 address comes back as the IPv6 one that stands for it.
    return re.sub(r"\[::ffff:([0-9.]+)\]", r"\1", router.getsockopt_string(zmq.LAST_ENDPOINT))
