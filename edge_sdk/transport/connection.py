"""One connection of a device: its DEALER socket and monitor, its configuration, its patience.

Not here: when to connect, and what is sent (`io_thread.py`).
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from edge_sdk.errors import ConfigError, EdgeError, PeerGone
from edge_sdk.protocol.packets import Lane
from edge_sdk.transport.byte_progress import ByteProgress
from edge_sdk.transport.keys import KeyPair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.sockets import ZERO_COPY_BYTES, monitor_events, tune_dealer

# libzmq gives up a socket that was refused; it is built anew after ever longer pauses (seconds).
REBUILD_FIRST_S = 1.0
REBUILD_MOST_S = 3.0
# Pauses are drawn between this share of their length and all of it, so that a fleet whose
# coordinator has come back does not dial at one moment.
LEAST_SHARE = 0.5


@dataclass(slots=True)
class Counters:
    """Counters of the I/O thread; others only read."""

    bytes_up: int = 0
    bytes_down: int = 0
    reconnects: int = 0
    rtt_s: float | None = None


def drawn(pause_s: float) -> float:
    """Return a pause in seconds, drawn anew: as long as *pause_s*, or a little shorter."""
    return pause_s * random.uniform(LEAST_SHARE, 1.0)


class Line:
    """One of the two connections; made by the I/O thread and used by it alone."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        config: LinkConfig,
        keys: KeyPair | None,
        lane: Lane,
        rebuild_pause_s: float = REBUILD_FIRST_S,
    ) -> None:
        self.lane = lane
        self.is_up = False
        self.is_attached = False
        self.is_full = False
        self.has_tcp = False  # somebody took a connection, and no handshake was completed since
        self.bytes = ByteProgress()
        self.attach_s = 0.0
        self.rebuild_s: float | None = None
        self.rebuild_pause_s = rebuild_pause_s
        self._poller = poller
        self.socket = context.socket(zmq.DEALER)
        self.monitor = self.socket.get_monitor_socket()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.monitor, zmq.POLLIN)
        try:
            self._connect(config, keys)
        except (zmq.ZMQError, ValueError) as error:
            self.close()
            raise ConfigError(f"cannot connect to {config.address!r}: {error}") from error

    def _connect(self, config: LinkConfig, keys: KeyPair | None) -> None:
        # libzmq doubles the pause from the first to the longest, and adds no chance of its own.
        first_ms = int(1000 * drawn(config.reconnect_s))
        tune_dealer(self.socket, self.lane, first_ms, int(1000 * drawn(config.reconnect_most_s)))
        # Random: whoever guesses a routing id could take the connection over.
        self.socket.setsockopt(zmq.ROUTING_ID, b"E" + secrets.token_bytes(15))
        if keys is not None:
            self.socket.curve_serverkey = config.server_key.encode()
            self.socket.curve_publickey = keys.public.encode()
            self.socket.curve_secretkey = keys.secret.encode()
        self.socket.connect(config.address)

    def next_pause_s(self) -> float:
        """Return the seconds after which the next socket is replaced if it is refused, too."""
        return min(2 * self.rebuild_pause_s, REBUILD_MOST_S)

    def put(self, frame: Any) -> bool:
        """Send a frame; return whether there was a connection with room for it."""
        try:
            self.socket.send(frame, zmq.NOBLOCK, copy=len(frame) < ZERO_COPY_BYTES)
        except zmq.Again:
            return False
        return True

    def wait_for_room(self) -> None:
        """Ask the poller to report when `put` is worth another try."""
        self.is_full = True
        self._poller.modify(self.socket, zmq.POLLIN | zmq.POLLOUT)

    def has_room(self) -> None:
        """Note that the poller has reported room."""
        self.is_full = False
        self._poller.modify(self.socket, zmq.POLLIN)

    def news(self) -> Iterator[tuple[int, int]]:
        """Yield (event, value) of the monitor, and note what they mean for the connection."""
        for event, value in monitor_events(self.monitor):
            if event == zmq.EVENT_CONNECTED:
                self.has_tcp = True
                self.bytes.connected(value)
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_up, self.has_tcp = True, False
            elif event == zmq.EVENT_DISCONNECTED:
                self.is_up = False
                self.bytes.disconnected()
            yield event, value

    def close(self) -> None:
        """Close the socket and its monitor."""
        self._poller.unregister(self.socket)
        self._poller.unregister(self.monitor)
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()


def no_contact(lines: Sequence[Line], config: LinkConfig) -> EdgeError:
    """Return the error to report when the first contact has failed."""
    address = config.address
    if any(line.is_up for line in lines):
        return PeerGone(f"{address} took the connection but does not answer")
    if any(line.has_tcp for line in lines):
        return PeerGone(
            f"{address} takes the connection but does not complete the handshake: wrong server key"
            f" (ours is {config.server_key or 'none'}), or no coordinator behind that address yet"
        )
    return PeerGone(f"nobody answers at {address}")


class Patience:
    """Decides when silence is reported to the application: once per period, then anew."""

    def __init__(self, config: LinkConfig, now_s: float) -> None:
        self.heard_s = now_s
        self._config = config
        self._was_attached = False
        self._until_s = now_s + config.patience_s
        self._next_s = now_s + min(config.first_contact_s, config.patience_s)

    def attached(self, now_s: float) -> None:
        """Note that the coordinator has taken us in."""
        self._was_attached = True
        self._next_s = now_s + self._config.patience_s

    def complaint(self, now_s: float, lines: Sequence[Line]) -> EdgeError | None:
        """Return the error to report now, if any."""
        if now_s < self._next_s:
            return None
        if not self._was_attached:
            self._next_s = now_s + self._config.first_contact_s
            if now_s < self._until_s < self._next_s:
                self._next_s = self._until_s
            return no_contact(lines, self._config)
        silent_s = now_s - self.heard_s
        if silent_s < self._config.patience_s:
            self._next_s = self.heard_s + self._config.patience_s
            return None
        self._next_s = now_s + self._config.patience_s
        text = f"nothing heard from {self._config.address} for {silent_s:.0f} s"
        if lines and not any(line.is_up for line in lines):  # its key may be another one now
            text += f": {no_contact(lines, self._config)}"
        return PeerGone(text)
