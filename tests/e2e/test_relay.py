"""The relay through which other tests break links does what it is told, and nothing else."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.e2e.relay import Relay

PATIENCE_S = 20.0


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Somebody who listens."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        opened.settimeout(PATIENCE_S)
        yield opened


@pytest.fixture
def relay(server: socket.socket) -> Iterator[Relay]:
    """A relay to `server`."""
    with Relay(f"tcp://127.0.0.1:{server.getsockname()[1]}") as opened:
        yield opened


def connect(relay: Relay, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Both ends of a new connection through the relay."""
    port = int(relay.address.rpartition(":")[2])
    near = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    far, _ = server.accept()
    far.settimeout(PATIENCE_S)
    return near, far


def test_bytes_go_both_ways_and_an_end_is_passed_on(relay: Relay, server: socket.socket) -> None:
    """Left alone, it is not noticed."""
    near, far = connect(relay, server)
    with near, far:
        near.sendall(b"up")
        assert far.recv(9) == b"up"
        far.sendall(b"down")
        assert near.recv(9) == b"down"
        far.close()
        assert near.recv(9) == b""


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_connections_end_at_once_and_new_ones_work(
    relay: Relay, server: socket.socket, how: str
) -> None:
    """Both ends of every connection notice; the next connection is like the first."""
    near, far = connect(relay, server)
    getattr(relay, how)()
    for end in (near, far):
        with end:
            try:
                assert end.recv(9) == b""
            except ConnectionResetError:
                assert how == "reset"
    near, far = connect(relay, server)
    with near, far:
        near.sendall(b"up")
        assert far.recv(9) == b"up"


def test_swallowed_connections_stay_open_and_new_ones_work(
    relay: Relay, server: socket.socket
) -> None:
    """Nobody notices: bytes are taken, an end is hidden; what comes after `heal` arrives."""
    near, far = connect(relay, server)
    other_near, other_far = connect(relay, server)
    with near, far, other_near, other_far:
        relay.swallow(directions=("up",), numbers=(0,))
        near.sendall(b"lost")
        far.sendall(b"down")
        assert near.recv(9) == b"down"
        other_near.sendall(b"other")
        assert other_far.recv(9) == b"other"
        while relay.num_swallowed < 4:
            time.sleep(0.01)
        relay.heal()
        near.sendall(b"up")
        assert far.recv(9) == b"up"


def test_all_can_be_swallowed(relay: Relay, server: socket.socket) -> None:
    """New connections come about, and lose what they carry, until `heal`."""
    relay.swallow(existing_only=False)
    near, far = connect(relay, server)
    with near, far:
        near.sendall(b"lost")
        while relay.num_swallowed < 4:
            time.sleep(0.01)
        relay.heal()
        near.sendall(b"up")
        assert far.recv(9) == b"up"


def test_a_pause_loses_nothing(relay: Relay, server: socket.socket) -> None:
    """What was sent in a pause arrives after it."""
    near, far = connect(relay, server)
    with near, far:
        relay.pause()
        near.sendall(b"later")
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(9)
        relay.heal()
        far.settimeout(PATIENCE_S)
        assert far.recv(9) == b"later"


def test_refused_connections_are_taken_and_reset(relay: Relay, server: socket.socket) -> None:
    """As by a tunnel with nobody at its other end; open connections go on."""
    near, far = connect(relay, server)
    with near, far:
        relay.refuse()
        port = int(relay.address.rpartition(":")[2])
        with (
            pytest.raises(ConnectionResetError),  # by the first call that hears of it
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as refused,
        ):
            refused.recv(9)
        near.sendall(b"up")
        assert far.recv(9) == b"up"


def test_a_limit_is_kept(relay: Relay, server: socket.socket) -> None:
    """Bytes take at least as long as the link needs for them."""
    relay.limit(100_000)
    near, far = connect(relay, server)
    with near, far:
        begin_s = time.monotonic()
        near.sendall(bytes(50_000))
        left = 50_000
        while left:
            left -= len(far.recv(left))
        assert time.monotonic() - begin_s >= 0.45
