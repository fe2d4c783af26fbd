"""The relay is a link: what comes out is what went in, not sooner than a link would bring it."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from coordinator.lab.experiment.relay import LinkShape, Relay

PATIENCE_S = 20.0


class Echo:
    """A server that sends everything back; `received` is what it got."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.received = bytearray()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(65536):
                    self.received += data
                    peer.sendall(data)
            except OSError:
                pass
        self.ended.set()

    def close(self) -> None:
        """Listen no longer."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)


@pytest.fixture
def echo() -> Iterator[Echo]:
    """A server behind the relay."""
    server = Echo()
    yield server
    server.close()


def aimed(echo: Echo, shape: LinkShape | None = None) -> Relay:
    """A relay to *echo*."""
    relay = Relay(shape)
    relay.aim("127.0.0.1", echo.port)
    return relay


def dial(relay: Relay) -> socket.socket:
    """Connect to the relay."""
    return socket.create_connection(("127.0.0.1", relay.port), PATIENCE_S)


def read(peer: socket.socket, num_bytes: int) -> bytes:
    """Read exactly so many bytes, or up to the end."""
    found = bytearray()
    while len(found) < num_bytes and (data := peer.recv(min(65536, num_bytes - len(found)))):
        found += data
    return bytes(found)


def there_and_back(peer: socket.socket, data: bytes) -> bytes:
    """Send *data* through the relay and read what comes back."""
    sender = threading.Thread(target=peer.sendall, args=(data,))
    sender.start()
    found = read(peer, len(data))
    sender.join(PATIENCE_S)
    return found


@pytest.mark.parametrize(
    "shape",
    [
        LinkShape(),
        LinkShape(up_bytes_per_s=5e6, down_bytes_per_s=8e6, delay_s=0.01, jitter_s=0.02),
    ],
)
def test_every_byte_arrives_once_and_in_order(echo: Echo, shape: LinkShape) -> None:
    """Several connections at once get their own bytes back, whatever rates, delay and jitter."""
    with aimed(echo, shape) as relay:
        sent = [os.urandom(400_000) for _ in range(3)]
        found: dict[int, bytes] = {}

        def exchange(number: int) -> None:
            with dial(relay) as peer:
                found[number] = there_and_back(peer, sent[number])

        threads = [threading.Thread(target=exchange, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)

        digests = {n: hashlib.sha256(data).digest() for n, data in found.items()}
        assert digests == {n: hashlib.sha256(data).digest() for n, data in enumerate(sent)}
        usage = relay.usage()
    assert (usage.bytes_up, usage.bytes_down, usage.num_connections) == (1_200_000, 1_200_000, 3)


def test_each_way_has_its_own_rate_and_delay(echo: Echo) -> None:
    """No byte is sooner than rate and delay allow, and both ways are charged at their own rate."""
    shape = LinkShape(up_bytes_per_s=1e6, down_bytes_per_s=4e6, delay_s=0.05)
    with aimed(echo, shape) as relay, dial(relay) as peer:
        began_s = time.monotonic()
        assert there_and_back(peer, b"x") == b"x"
        assert time.monotonic() - began_s >= 2 * shape.delay_s
        began_s = time.monotonic()
        data = os.urandom(300_000)
        assert there_and_back(peer, data) == data
        seconds = time.monotonic() - began_s

        usage = relay.usage()
    # The burst is what an idle link lets through at once.
    assert seconds >= 300_000 / 1e6 + 2 * shape.delay_s - 0.003
    assert usage.up_s == pytest.approx(300_001 / 1e6)
    assert usage.down_s == pytest.approx(300_001 / 4e6)


def test_connections_share_one_rate(echo: Echo) -> None:
    """A small message is not kept waiting by a large one on another connection of the link."""
    relay = aimed(echo, LinkShape(up_bytes_per_s=500_000))
    with relay, dial(relay) as bulk, dial(relay) as control:
        assert there_and_back(bulk, b"a") == b"a"
        assert there_and_back(control, b"b") == b"b"
        bulk.settimeout(PATIENCE_S)
        sender = threading.Thread(target=bulk.sendall, args=(bytes(500_000),))
        sender.start()
        while relay.usage().bytes_up < 50_000:
            time.sleep(0.005)

        assert there_and_back(control, b"now") == b"now"
        assert relay.usage().bytes_up < 500_000
        assert len(read(bulk, 500_000)) == 500_000
        sender.join(PATIENCE_S)


def test_nothing_passes_a_cut_and_nothing_is_lost(echo: Echo) -> None:
    """During a cut no byte and no end of a connection passes; after it all of it does."""
    with aimed(echo) as relay, dial(relay) as peer:
        assert there_and_back(peer, b"before") == b"before"
        relay.cut()
        time.sleep(0.05)
        peer.sendall(b"during")
        peer.shutdown(socket.SHUT_WR)
        assert not echo.ended.wait(0.2)
        assert bytes(echo.received) == b"before"
        relay.mend()
        assert read(peer, 6) == b"during"
        assert read(peer, 1) == b""
        assert echo.ended.wait(PATIENCE_S)


def test_a_cut_ends_by_itself_and_cuts_may_overlap(echo: Echo) -> None:
    """The link is back when the longest cut has ended."""
    with aimed(echo) as relay, dial(relay) as peer:
        assert there_and_back(peer, b"1") == b"1"
        began_s = time.monotonic()
        relay.cut(0.1)
        relay.cut(0.4)
        time.sleep(0.02)
        assert there_and_back(peer, b"2") == b"2"
        assert time.monotonic() - began_s >= 0.4


def test_a_mended_cut_does_not_end_a_later_one(echo: Echo) -> None:
    """When the seconds of the first cut are over, the second one goes on."""
    with aimed(echo) as relay, dial(relay) as peer:
        assert there_and_back(peer, b"1") == b"1"
        relay.cut(0.1)
        relay.mend()
        relay.cut()
        time.sleep(0.2)
        peer.settimeout(0.2)
        peer.sendall(b"2")
        with pytest.raises(TimeoutError):
            peer.recv(1)
        relay.mend()
        peer.settimeout(PATIENCE_S)
        assert read(peer, 1) == b"2"


def test_a_dropped_connection_is_reset_and_the_next_one_works(echo: Echo) -> None:
    """What was under way when the connection was dropped never arrives."""
    with aimed(echo) as relay:
        with dial(relay) as peer:
            assert there_and_back(peer, b"old") == b"old"
            relay.cut()
            time.sleep(0.05)
            peer.sendall(b"lost")
            relay.drop()
            with pytest.raises(ConnectionResetError):
                peer.recv(1)
            relay.mend()
        with dial(relay) as peer:
            assert there_and_back(peer, b"new") == b"new"
        assert b"lost" not in echo.received


def test_a_link_may_change(echo: Echo) -> None:
    """The new rate holds for the bytes that come after it."""
    with aimed(echo, LinkShape(up_bytes_per_s=100e6)) as relay, dial(relay) as peer:
        data = bytes(200_000)
        assert there_and_back(peer, data) == data
        before = relay.usage().up_s
        relay.reshape(LinkShape(up_bytes_per_s=1e6))
        began_s = time.monotonic()
        assert there_and_back(peer, data) == data
        assert time.monotonic() - began_s >= 0.19
        assert relay.usage().up_s - before == pytest.approx(0.2)


def test_nobody_there(echo: Echo) -> None:
    """Without a listener behind it the relay closes the connection, and serves the next one."""
    with Relay() as relay:
        with dial(relay) as peer:
            assert read(peer, 1) == b""
        relay.aim("127.0.0.1", echo.port)
        with dial(relay) as peer:
            assert there_and_back(peer, b"x") == b"x"


def test_closing_leaves_nothing(echo: Echo) -> None:
    """After close the port is free, the thread has ended, and open connections are reset."""
    threads = threading.active_count()
    relay = Relay(LinkShape(up_bytes_per_s=1000.0, delay_s=5.0))
    relay.aim("127.0.0.1", echo.port)
    with dial(relay) as peer:
        peer.sendall(bytes(100_000))
        relay.close()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    with pytest.raises(OSError, match="refused"):
        dial(relay)
    relay.close()
    relay.cut()
    assert threading.active_count() <= threads + 1  # the echo's own thread of a connection


@pytest.mark.parametrize(
    ("field", "value"),
    [("up_bytes_per_s", 0.0), ("down_bytes_per_s", -1.0), ("delay_s", -0.1), ("jitter_s", 1e400)],
)
def test_a_shape_that_no_link_has_is_refused(field: str, value: float) -> None:
    """The message names the field."""
    with pytest.raises(ValueError, match=field):
        LinkShape(**{field: value})
