"""What the kernel knows of a connection that libzmq holds, and an end to it: by its descriptor.

libzmq tells the number of a connection's descriptor and nothing of what waits in it; nor does it
close one when we want that. It may close one at any time itself, so that a number may be another
connection's by now: `hang_up` looks before it acts. On Linux; elsewhere nothing is known.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import sys
import termios
import threading
from contextlib import suppress
from typing import NamedTuple

# struct tcp_info, linux/tcp.h: bytes acknowledged and received since the connection was made.
_ACKED_AND_RECEIVED = struct.Struct("=120xQQ")
_INFO_BYTES = _ACKED_AND_RECEIVED.size
_QUEUED = struct.Struct("=i")
# Called plainly, without a socket object around the descriptor: it is done for every connection
# several times a second, and costs a tenth so. It cannot block, so that the interpreter is kept.
_getsockopt = ctypes.PyDLL(None).getsockopt if sys.platform == "linux" else None


class _Answer(threading.local):
    """Where the kernel writes its answer; made once for each thread."""

    def __init__(self) -> None:
        self.info = ctypes.create_string_buffer(_INFO_BYTES)
        self.size = ctypes.c_uint32(_INFO_BYTES)
        self.size_at = ctypes.byref(self.size)


_answer = _Answer()


class ByteCounts(NamedTuple):
    """Bytes of a connection since it was made."""

    acked: int
    """The other side's kernel has them."""
    received: int
    """Ours has had them, whoever has read them."""


def bytes_moved(descriptor: int) -> ByteCounts | None:
    """Return what has come and gone; None where that is not known, or no connection is there."""
    if _getsockopt is None:
        return None
    info, size, size_at = _answer.info, _answer.size, _answer.size_at
    size.value = _INFO_BYTES
    failed = _getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, info, size_at)
    if failed or size.value < _INFO_BYTES:  # closed meanwhile, or an older kernel
        return None
    return ByteCounts(*_ACKED_AND_RECEIVED.unpack(info))


def bytes_unsent(descriptor: int) -> int:
    """Return the bytes that the other side's kernel has not acknowledged; 0 if that is unknown."""
    with suppress(OSError, struct.error):
        queued = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(_QUEUED.size))
        return int(_QUEUED.unpack(queued)[0])
    return 0


def peer_of(descriptor: int) -> tuple[str, int] | None:
    """Return address and port of the other side; None where nobody is."""
    with suppress(OSError), socket.socket(fileno=descriptor) as sock:
        try:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            address, port = sock.getpeername()[:2]
            return address.removeprefix("::ffff:"), port
        finally:
            sock.detach()
    return None


def hang_up(descriptor: int, peer: tuple[str, int]) -> bool:
    """End the connection with *peer*; return whether there was one. libzmq finds its end."""
    if peer_of(descriptor) != peer:
        return False
    with suppress(OSError), socket.socket(fileno=descriptor) as sock:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        finally:
            sock.detach()
    return True
