"""Bytes that move are seen before a frame is whole; those that a middlebox swallows are not."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest

from edge_sdk.deadline import Deadline
from edge_sdk.transport.byte_progress import ByteProgress, Moved

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
PATIENCE_S = 20.0
STILL = Moved(False, False)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection; the second takes little at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


def watching(near: socket.socket) -> ByteProgress:
    """Progress of a connection that has been looked at."""
    progress = ByteProgress()
    progress.connected(near.fileno())
    progress.look()
    return progress


def until(progress: ByteProgress, wanted: Moved) -> None:
    """Look until *wanted* is seen."""
    deadline = Deadline.after(PATIENCE_S)
    while progress.look() != wanted:
        assert not deadline.has_passed()


def test_a_part_of_a_frame_is_seen(ends: tuple[socket.socket, socket.socket]) -> None:
    """Every byte that arrives counts, once."""
    near, far = ends
    progress = watching(near)

    assert progress.look() == STILL
    far.sendall(b"x")
    until(progress, Moved(False, True))
    assert progress.look() == STILL


def test_a_queue_that_shrinks_is_seen(ends: tuple[socket.socket, socket.socket]) -> None:
    """A slow reader keeps the queue full and takes from it; one that stands still takes nothing."""
    near, far = ends
    near.setblocking(False)
    with contextlib.suppress(BlockingIOError):  # full
        while True:
            near.send(bytes(1 << 20))
    progress = watching(near)
    while progress.look() != STILL:
        pass  # what was still on its way

    assert progress.look() == STILL
    for _ in range(8):
        far.recv(64 * 1024)
    until(progress, Moved(True, False))


def test_what_is_taken_at_once_is_no_progress(ends: tuple[socket.socket, socket.socket]) -> None:
    """Small frames that the other end acknowledges say nothing of who reads them."""
    near, _ = ends
    progress = watching(near)
    near.sendall(b"a heartbeat")
    acked = Deadline.after(PATIENCE_S)
    while progress.look().up:
        assert not acked.has_passed()

    for _ in range(100):
        assert progress.look() == STILL


def test_a_connection_that_is_gone_does_not_move() -> None:
    """Whatever the number of its descriptor stands for now: no error, and nothing is closed."""
    with open(__file__) as file:
        progress = ByteProgress()
        assert progress.look() == STILL
        progress.connected(file.fileno())
        assert progress.look() == STILL
        progress.connected(1_000_000)
        assert progress.look() == STILL
        assert file.readline()
