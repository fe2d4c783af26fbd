"""What both ends of the link do with libzmq: options, monitors, waking an I/O thread.

Not here: who connects to whom (`io_thread.py`, and `coordinator/gateway/io_thread.py`). Settings
were measured to be safe; each has its reason beside it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import zmq

from edge_sdk.protocol.packets import MAX_FRAME_BYTES, Lane

# libzmq counts messages, not bytes. A registered but hostile peer can pile up so many frames on a
# connection; `channel.MAX_PACKETS_IN_FLIGHT` keeps honest peers below.
QUEUE_FRAMES = 128
# Below this size a copy is cheaper than the bookkeeping of sending without one.
ZERO_COPY_BYTES = 64 * 1024
# A stranger may hold a half-open handshake, which costs a file descriptor, for this long.
HANDSHAKE_MS = 5_000
# First frame of a monitor's message, zmq_socket_monitor(3): event and value. pyzmq's own parser
# would load asyncio, a fifth of what importing this package takes.
EVENT = struct.Struct("=Hi")


def tune(sock: zmq.Socket[bytes]) -> None:
    """Set the options that all our sockets share."""
    sock.linger = 0  # what matters has been acked
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)  # else a stranger's length is allocated
    sock.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
    sock.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    sock.setsockopt(zmq.IPV6, 1)
    # Routers forget idle connections after 350 s; Linux would notice after two hours.
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
    sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 15)
    sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
    with suppress(zmq.ZMQError):  # only where the kernel has it
        sock.setsockopt(zmq.TCP_MAXRT, 30_000)


def tune_dealer(sock: zmq.Socket[bytes], lane: Lane, reconnect_ms: int, most_ms: int) -> None:
    """Set the options of a connecting socket, those of `tune` included."""
    tune(sock)
    sock.setsockopt(zmq.IMMEDIATE, 1)  # else frames pile up for a peer that is not there
    sock.setsockopt(zmq.CONNECT_TIMEOUT, 4_000)  # the kernel's own tries come ever more rarely
    sock.setsockopt(zmq.RECONNECT_IVL, reconnect_ms)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, most_ms)  # no back-off unless set
    if lane == Lane.CONTROL:
        # Never on bulk: only whole frames count as life, so a slow chunk would end the link.
        sock.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)


def monitor_events(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """Yield (event, value) for all that the monitor holds; if it is full, it blocks reconnects."""
    while True:
        try:
            parts = monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        event, value = EVENT.unpack(parts[0])
        yield event, value


def receive_frame(sock: zmq.Socket[bytes]) -> zmq.Frame | None:
    """Return the next message of one frame; None if it has several, which we never send."""
    frame = sock.recv(zmq.NOBLOCK, copy=False)
    assert isinstance(frame, zmq.Frame)
    if not frame.more:
        return frame
    while sock.getsockopt(zmq.RCVMORE):
        sock.recv(copy=False)
    return None


def frame_property(frame: zmq.Frame, name: str) -> str:
    """Return what libzmq knows of a frame's connection; empty where it does not."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


class Waker:
    """Lets other threads interrupt the poll of an I/O thread."""

    def __init__(self) -> None:
        self._inner, self._outer = socket.socketpair()
        self._inner.setblocking(False)
        self._outer.setblocking(False)
        self._is_awake = False

    def fileno(self) -> int:
        """Return what to poll for reading."""
        return self._inner.fileno()

    def wake(self) -> None:
        """Make the poll return; this is cheap when it is about to return anyway."""
        if not self._is_awake:
            self._is_awake = True
            with suppress(OSError):  # full means awake, closed means over
                self._outer.send(b"w")

    def clear(self) -> None:
        """Forget calls of `wake`; the I/O thread does so before it looks at what was queued."""
        with suppress(OSError):
            self._inner.recv(64)
        self._is_awake = False

    def close(self) -> None:
        """Close both ends."""
        self._inner.close()
        self._outer.close()
