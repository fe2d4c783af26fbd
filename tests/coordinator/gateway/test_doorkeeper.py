"""Whoever connects costs little: strangers are few, and a device holds what its credit allows."""

from __future__ import annotations

import os
import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import zmq

from coordinator.gateway import doorkeeper, sessions
from coordinator.gateway.doorkeeper import PortConnection, fault_of, wire_bytes
from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Event, Joined, Left, Received
from coordinator.gateway.keys import zap
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.deadline import Deadline
from edge_sdk.errors import PeerGone
from edge_sdk.files import atomic_write
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import OutgoingMessage
from edge_sdk.protocol.messages import PartData, Stamp
from edge_sdk.protocol.packets import Attach, Lane
from edge_sdk.transport.descriptors import bytes_moved
from edge_sdk.transport.keys import KeyPair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.coordinator.gateway.conftest import ONE, SERVER, TWO
from tests.coordinator.gateway.test_gateway import (
    PAUSED,
    RawDevice,
    open_link,
    until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
PATIENCE_S = 60.0
# What ZeroMQ's clients say first, and a CURVE command of 1 MiB that is never finished.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
HALF = b"\x06" + struct.pack(">Q", 1 << 20)
STRANGERS = {
    "nothing": b"",
    "half a greeting": GREETING[:20],
    "greeting": GREETING,
    "NULL": GREETING.replace(b"CURVE", b"NULL\0"),
    "old ZeroMQ": b"\x01\x00",
    "garbage": bytes(range(256)) * 4,
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "too long a command": GREETING + b"\x06" + struct.pack(">Q", 1 << 40),
    "half a command": GREETING + HALF + bytes(4096),
}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[ZmqGateway]:
    """An open gateway for `one` and `two`."""
    allowed = AllowList(tmp_path / "allowed.json")
    allowed.register("one", ONE.public)
    allowed.register("two", TWO.public)
    with ZmqGateway(GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER), allowed) as opened:
        yield opened


def dial(gateway: ZmqGateway) -> socket.socket:
    """Connect without a key."""
    sock = socket.create_connection(("127.0.0.1", int(gateway.address.rsplit(":", 1)[1])), 10.0)
    sock.settimeout(20.0)
    return sock


def is_closed(sock: socket.socket) -> bool:
    """Read to the end of a connection; return whether it has one."""
    with suppress(ConnectionError):
        while sock.recv(65536):
            pass
    return True


def send_slowly(sock: socket.socket, num_bytes: int, what: bytes = bytes(1 << 10)) -> None:
    """Send zeros, a megabyte a second, or the bytes of *what* one by one."""
    for number in range(num_bytes >> 10):
        at = number % len(what)
        sock.sendall(what if not any(what) else what[at : at + 1])
        time.sleep(0.001 if not any(what) else 0.05)


def why(events: list[Event]) -> str:
    """Return the reason of the last event, by which a device has left."""
    assert isinstance(events[-1], Left)
    return events[-1].reason


def wait_for(met: Callable[[], bool]) -> None:
    """Wait until *met*."""
    deadline = Deadline.after(PATIENCE_S)
    while not met():
        assert not deadline.has_passed()
        time.sleep(0.01)


def trains(gateway: ZmqGateway, keys: KeyPair = TWO) -> bool:
    """Return whether a device gets in and its message arrives."""
    with open_link(gateway, keys) as link:
        link.send(PAUSED)
        return bool(until(gateway, Received, PATIENCE_S))


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_are_few_and_forgotten(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever they say or do not say; a device gets in beside them, nothing is left."""
    monkeypatch.setattr(doorkeeper, "MOST_STRANGERS_EACH", 10)
    connections = gateway._io.door.connections
    with ExitStack() as stack:
        socks = [stack.enter_context(dial(gateway)) for _ in range(40)]
        for sock in socks:
            with suppress(ConnectionError):
                sock.sendall(STRANGERS[kind])
        wait_for(lambda: len(connections) <= 10)
        assert trains(gateway)
        for sock in socks:
            sock.close()
    wait_for(lambda: not connections)


def test_who_sends_byte_by_byte_is_not_waited_for(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the middle of a handshake nor after one."""
    monkeypatch.setattr(doorkeeper, "GREETING_S", 0.5)
    connections = gateway._io.door.connections
    with dial(gateway) as slow, RawDevice(gateway, ONE, is_attached=False) as mute:
        wait_for(lambda: len(connections) == 2)
        mute.socket.reconnect_ivl = -1
        with pytest.raises(ConnectionError):
            send_slowly(slow, 1 << 20, GREETING)
        wait_for(lambda: not connections)


def test_a_key_that_dials_without_end_has_to_wait(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is let in again a little later, without a word; other keys are let in meanwhile."""
    monkeypatch.setattr(zap, "MOST_HANDSHAKES", 4.0)
    began = Deadline.after(0.0)
    for _ in range(4):
        with RawDevice(gateway, ONE, is_attached=False) as raw:
            raw.socket.send(b"garbage")
            raw.read()
    assert trains(gateway, TWO)
    assert trains(gateway, ONE)
    assert Deadline.after(0.0).at_s - began.at_s > 0.5


def test_a_crowd_loses_its_oldest(gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stranger too many costs the address with most strangers the one that came first."""
    monkeypatch.setattr(doorkeeper, "MOST_STRANGERS_EACH", 3)
    with ExitStack() as stack:
        socks = []
        for _ in range(5):
            socks.append(stack.enter_context(dial(gateway)))
            wait_for(lambda: len(gateway._io.door.connections) == min(3, len(socks)))

        assert all(is_closed(sock) for sock in socks[:2])


def test_what_a_stranger_sends_is_not_kept(gateway: ZmqGateway) -> None:
    """Of a first command of a megabyte little is taken: there is no such handshake."""
    with dial(gateway) as sock:
        sock.sendall(GREETING + HALF)
        with pytest.raises(ConnectionError):
            send_slowly(sock, 1 << 20)


def test_a_key_has_few_connections_and_none_without_a_session_for_long(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest idle one goes, then all of them; the session stays."""
    monkeypatch.setattr(doorkeeper, "MOST_EACH", 4)
    connections = gateway._io.door.connections
    with RawDevice(gateway, ONE) as device, ExitStack() as stack:
        for _ in range(10):
            raw = stack.enter_context(RawDevice(gateway, ONE, is_attached=False))
            raw.socket.reconnect_ivl = -1
            raw.socket.send(b"garbage")
        wait_for(lambda: sum(c.name == "one" for c in connections.values()) <= 4)
        monkeypatch.setattr(doorkeeper, "IDLE_S", 0.1)
        wait_for(lambda: sum(c.num_lanes for c in connections.values()) == 1)
        device.socket.send(device.first(packed(PAUSED)))

        assert until(gateway, Received)[-1].device == "one"


def a_part(number: int) -> PartData:
    """Return a message that a device may ask for again and again."""
    return PartData(stamp=Stamp(), sha256="0" * 64, offset=number, total_bytes=1 << 30)


def packed(message: object) -> bytes:
    """Return the payload of a message without tensors."""
    return OutgoingMessage(message, {}).head


def test_a_message_of_a_thousand_parts_is_not_put_together(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends its session; on a machine that is not busy before its last part is there."""
    monkeypatch.setattr(doorkeeper, "MOST_HELD_BYTES", 1 << 20)
    monkeypatch.setattr(doorkeeper, "LOOK_S", 0.005)
    with RawDevice(gateway, ONE) as raw:
        raw.socket.sndhwm = 0
        part = bytes(1 << 16)
        for _ in range(1000):
            raw.socket.send(part, zmq.SNDMORE, copy=False)
        raw.socket.send(b"")
        events = until(gateway, Left, PATIENCE_S)

    assert re.search("bytes that make no packet|a message in several parts", why(events))
    assert trains(gateway)


def test_more_frames_than_any_device_needs_end_the_session(gateway: ZmqGateway) -> None:
    """Heartbeats are answered whatever the credit: not a hundred thousand of them."""
    beat = packets.Heartbeat(sent_s=0.0, rtt_s=0.0, numbers={})
    with RawDevice(gateway, ONE) as raw:
        raw.socket.sndtimeo = 1000
        with suppress(zmq.ZMQError):
            for _ in range(10_000):
                raw.socket.send(packets.control_frame(beat, tag=raw.talk.tag))
        events = until(gateway, Left, PATIENCE_S)

    assert "more frames than any device needs" in why(events)


def test_who_opens_session_after_session_has_to_wait(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key opens few of them at once; breaches of the protocol count for several."""
    monkeypatch.setattr(sessions, "MOST_SESSIONS", 10.0)
    joined = 0
    with RawDevice(gateway, ONE) as raw:
        for _ in range(100):
            nothing = raw.talk.ack()
            control = Attach(
                session=secrets.token_hex(16),
                is_resumed=False,
                sdk_version="",
                name="",
                ack=nothing,
            )
            raw.socket.send(packets.control_frame(control, Lane.CONTROL, 0))
        deadline = Deadline.after(2.0)
        while deadline.left_s():
            joined += sum(isinstance(event, Joined) for event in gateway.events(0.1))

    assert 2 <= joined <= 13
    assert trains(gateway)


def test_who_acks_nothing_is_not_kept_in_memory(gateway: ZmqGateway) -> None:
    """The session of a device that asks on and takes nothing ends; honest ones never come near."""
    part = np.zeros(4 << 20, np.uint8)
    with RawDevice(gateway, ONE):
        until(gateway, Joined)
        for number in range(100):
            with suppress(PeerGone):
                gateway.send("one", a_part(number), {"data": (part, "uint8")})
        events = until(gateway, Left)

    assert "bytes wait for it" in why(events)


def test_an_attach_on_the_same_connection_sends_nothing_again(gateway: ZmqGateway) -> None:
    """What is on its way is on its way: asking again and again fills no queue."""
    part = np.zeros(2 << 20, np.uint8)
    with RawDevice(gateway, ONE) as raw:
        until(gateway, Joined)
        gateway.send("one", a_part(0), {"data": (part, "uint8")})
        for lane in (Lane.BULK, Lane.BULK, Lane.BULK):
            control = Attach(
                session=raw.talk.session,
                is_resumed=True,
                sdk_version="",
                name="",
                ack=raw.talk.ack(),
            )
            raw.socket.send(packets.control_frame(control, lane, raw.talk.tag))
        time.sleep(0.5)
        [session] = gateway._io.sessions.values()

        assert session.talk.senders[Lane.BULK].num_resent == 0


def test_telemetry_that_is_not_ours_goes_to_no_file() -> None:
    """A heartbeat may name a thousand things, each as it likes."""
    numbers = {f"n{number}": 1.0 for number in range(1000)}

    assert len(sessions.clean_numbers(numbers)) == sessions.MOST_NUMBERS
    assert sessions.clean_numbers({"cpu.0": 2.0, "\x1b[2J": 1.0, "A": 1.0, "x" * 99: 1.0}) == {
        "cpu.0": 2.0
    }


def test_a_fault_has_a_bound() -> None:
    """Strangers by what they send and how long they stay, devices by what libzmq holds for them."""
    stranger = PortConnection(5, ("10.0.0.1", 1), "10.0.0.1", 100.0)
    device = PortConnection(6, ("10.0.0.2", 1), "10.0.0.2", 100.0, name="one", num_lanes=1)
    much = doorkeeper.MOST_HELD_BYTES + 1

    assert fault_of(stranger, doorkeeper.MOST_GREETING_BYTES, 0, 105.0) is None
    assert "bytes before its key" in (fault_of(stranger, much, 0, 105.0) or "")
    assert "no word" in (fault_of(stranger, 0, 0, 111.0) or "")
    assert fault_of(device, 10, 10, 1e9) is None
    assert "make no packet" in (fault_of(device, much, 0, 100.0) or "")
    device.taken_bytes, device.given_bytes = much, much
    assert "does not take" in (fault_of(device, much, 0, 100.0) or "")
    assert fault_of(device, much, much, 100.0) is None
    device.num_lanes = 0
    assert fault_of(device, much, much, 131.0) == "no session"


def test_bytes_on_the_wire_are_counted_as_they_are(gateway: ZmqGateway) -> None:
    """Frames of any size: what the kernel has received is what we had, and a handshake."""
    with RawDevice(gateway, ONE) as raw:
        for size in (1, 200, 221, 222, 223, 224, 70_000):
            raw.socket.send(bytes(size))
        wait_for(lambda: len(gateway.events(0.1)) >= 0 and counted(gateway) > 70_000)
        [connection] = gateway._io.door.connections.values()
        time.sleep(0.2)
        moved = bytes_moved(connection.descriptor)

    assert moved is not None
    assert 0 < moved.received - connection.taken_bytes < 2048
    assert wire_bytes(222) == 222 + 33 + 2


def counted(gateway: ZmqGateway) -> int:
    """Return the bytes that were taken from all connections."""
    return sum(c.taken_bytes for c in list(gateway._io.door.connections.values()))


FEW = 1024


def test_descriptors_run_out_for_strangers_alone(tmp_path: Path) -> None:
    """With 1,024 descriptors and 1,400 connections without a key, files open, devices get in."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            import resource

            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, most))
            allowed = AllowList(tmp_path / "allowed.json")
            allowed.register("two", TWO.public)
            config = GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER)
            with ZmqGateway(config, allowed) as gateway:
                os.write(writing, gateway.address.encode())
                deadline = Deadline.after(PATIENCE_S)
                while not deadline.has_passed():
                    atomic_write(tmp_path / "file", "still", sync=False)
                    if any(isinstance(event, Received) for event in gateway.events(0.01)):
                        code = 0
                        break
        finally:
            os._exit(code)
    address = os.read(reading, 100).decode()
    with ExitStack() as stack:
        for descriptor in (reading, writing):
            stack.callback(os.close, descriptor)
        port = int(address.rsplit(":", 1)[1])
        for _ in range(1400):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 10.0))
        link = LinkConfig(address=address, server_key=SERVER.public, keys=TWO, beat_s=0.1)
        with ZmqLink(link) as device:
            device.send(PAUSED)
            _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
