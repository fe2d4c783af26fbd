"""The device's link over real sockets: nothing lost, nothing twice, and clear errors."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import zmq

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Event, Joined, Left, Received
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.deadline import Deadline
from edge_sdk.errors import (
    LocalProtocolError,
    PeerGone,
    ReceiveTimeout,
    RefusedError,
    RemoteProtocolError,
    SessionLost,
)
from edge_sdk.protocol.messages import (
    AdapterUpload,
    PartData,
    Pause,
    Paused,
    Probe,
    Stamp,
    TopHidden,
)
from edge_sdk.protocol.packets import Lane
from edge_sdk.transport.keys import KeyPair, make_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.memory_link import memory_pair
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.relay import Relay

SERVER = make_key_pair()
DEVICE = make_key_pair()


def open_gateway(folder: Path, address: str = "tcp://127.0.0.1:*") -> ZmqGateway:
    """Return a gateway that knows one device, called `d1`."""
    allowed = AllowList(folder / "allowed.json")
    allowed.register("d1", DEVICE.public)
    config = GatewayConfig(address=address, keys=SERVER, max_message_bytes=1 << 26)
    return ZmqGateway(config, allowed)


def open_link(address: str, server: str = SERVER.public, keys: KeyPair = DEVICE) -> ZmqLink:
    """Return a link that reconnects quickly."""
    return ZmqLink(
        LinkConfig(
            address=address,
            server_key=server,
            keys=keys,
            reconnect_s=0.05,
            reconnect_most_s=0.2,
            first_contact_s=3.0,
            beat_s=0.2,
            chunk_bytes=1 << 17,
        )
    )


def collect(gateway: ZmqGateway, count: int, kind: type, seconds: float = 10.0) -> list[Event]:
    """Return events until *count* of *kind* have come."""
    deadline, found = Deadline.after(seconds), []
    while sum(isinstance(event, kind) for event in found) < count:
        assert not deadline.has_passed(), found
        found += gateway.events(0.2)
    return found


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[ZmqGateway]:
    """An open gateway that knows `d1`."""
    with open_gateway(tmp_path) as opened:
        yield opened


def paused(step: int) -> Paused:
    """Return a message with a number."""
    return Paused(stamp=Stamp(step=step))


def test_messages_and_tensors_go_both_ways(gateway: ZmqGateway) -> None:
    """Messages of both sizes arrive in order with equal tensors, up and down."""
    array = np.random.default_rng(0).standard_normal((5, 10, 1000), np.float32)
    with open_link(gateway.address) as link:
        link.send(paused(0))
        link.send(AdapterUpload(stamp=Stamp(step=1)), {"x": (array, "float32")})
        link.send(paused(2))
        events = collect(gateway, 3, Received)
        assert isinstance(events[0], Joined)
        gateway.send("d1", TopHidden(stamp=Stamp(), micro=4), {"hidden": (array, "bfloat16")})
        answer = link.receive(Deadline.after(5))

    got = [event.envelope for event in events if isinstance(event, Received)]
    assert [one.message.stamp.step for one in got] == [0, 1, 2]
    np.testing.assert_array_equal(got[1].tensors["x"], array)
    np.testing.assert_allclose(answer.tensors["hidden"], array, rtol=1 / 128)
    assert answer.tensors["hidden"].flags.writeable
    assert answer.message == TopHidden(stamp=Stamp(), micro=4)


def test_close_flushes_and_says_goodbye(gateway: ZmqGateway) -> None:
    """What was sent before close arrives, then the device has left."""
    with open_link(gateway.address) as link:
        link.send(Probe(stamp=Stamp()), {"data": (np.ones(1 << 20, np.uint8), "uint8")})

    events = collect(gateway, 1, Left)

    assert [type(event) for event in events] == [Joined, Received, Left]


def test_receive_is_bounded(gateway: ZmqGateway) -> None:
    """Waiting ends with the deadline; a closed link and a wrong message are our own fault."""
    link = open_link(gateway.address)
    with pytest.raises(ReceiveTimeout):
        link.receive(Deadline.after(0.1))
    with pytest.raises(LocalProtocolError, match="not a message of a device"):
        link.send(Pause(stamp=Stamp()))
    link.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        link.receive(Deadline.after(5))
    with pytest.raises(LocalProtocolError, match="closed"):
        link.send(paused(0))


def test_unregistered_key_is_refused_and_gets_in_once_registered(tmp_path: Path) -> None:
    """A stranger's key is named in the error; after registering it the same link works."""
    allowed = AllowList(tmp_path / "allowed.json")
    config = GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER)
    with ZmqGateway(config, allowed) as gateway, open_link(gateway.address) as link:
        with pytest.raises(RefusedError, match="does not know this device's key") as error:
            link.receive(Deadline.after(10))
        AllowList(tmp_path / "allowed.json").register("late", DEVICE.public)
        events = collect(gateway, 1, Joined)

    assert DEVICE.public in str(error.value)
    assert events[0].device == "late"


def test_a_wrong_server_key_is_told_and_may_turn_out_right(gateway: ZmqGateway) -> None:
    """Nothing proves it: the text names both possibilities and our key, and the link goes on."""
    wrong = make_key_pair().public
    with open_link(gateway.address, server=wrong) as link:
        for _ in range(2):
            with pytest.raises(PeerGone, match="wrong server key.*or no coordinator") as error:
                link.receive(Deadline.after(15))

    assert wrong in str(error.value)


@pytest.mark.parametrize("how", ["reset", "hang"])
def test_something_that_takes_the_connection_is_no_wrong_key(
    gateway: ZmqGateway, how: Literal["reset", "hang"]
) -> None:
    """A tunnel or load balancer before its coordinator is there: told, and joined once it is."""
    with Relay(gateway.address) as relay:
        relay.refuse(how)
        with open_link(relay.address) as link:
            with pytest.raises(PeerGone, match="no coordinator behind that address yet"):
                link.receive(Deadline.after(15))
            relay.heal()
            collect(gateway, 1, Joined, 30.0)


def test_a_page_about_an_error_is_not_the_end(tmp_path: Path) -> None:
    """A proxy may send such until its coordinator is there, and libzmq gives the socket up."""
    page = b"HTTP/1.1 502 Bad Gateway\r\n\r\n" * 20
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        link = open_link(address)
        for _ in Lane:
            with server.accept()[0] as peer:
                peer.sendall(page)
                with contextlib.suppress(ConnectionResetError):
                    while peer.recv(1024):  # until it hangs up
                        pass
    with link, open_gateway(tmp_path, address) as gateway:
        collect(gateway, 1, Joined, 30.0)


def test_another_program_of_zeromq_is_certain() -> None:
    """Who greets without keys is no coordinator of ours, and that ends the device."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        link = open_link(f"tcp://127.0.0.1:{port}")
        with link, pytest.raises(RefusedError, match="no coordinator of ours"):
            link.receive(Deadline.after(15))


def test_nobody_there_is_told() -> None:
    """Without anybody at the address the first contact ends in an error that says so."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    link = open_link(f"tcp://127.0.0.1:{port}")
    with link, pytest.raises(PeerGone, match="nobody answers"):
        link.receive(Deadline.after(15))


def test_cut_connections_lose_and_double_nothing(gateway: ZmqGateway) -> None:
    """TCP cut again and again in mid-message: every message arrives once, in order, both ways."""
    count, array, cuts = 60, np.arange(1_600_000).astype(np.uint8), 0
    with Relay(gateway.address) as relay, open_link(relay.address) as link:
        collect(gateway, 1, Joined)
        for step in range(count):
            tensors = {"data": (array + step, "uint8")} if step % 3 == 0 else {}
            link.send(Probe(stamp=Stamp(step=step)), tensors)
            gateway.send("d1", Probe(stamp=Stamp(step=step)), tensors)
        up, down_steps = [], []
        deadline, seen = Deadline.after(20), 0
        while len(up) < count or len(down_steps) < count:
            assert not deadline.has_passed(), (len(up), len(down_steps))
            num_bytes = sum(relay.num_bytes.values())
            if cuts < 5 and num_bytes - seen > 6_000_000:
                seen, cuts = num_bytes, cuts + 1
                relay.cut()
            up += [event for event in gateway.events(0.01) if isinstance(event, Received)]
            with contextlib.suppress(ReceiveTimeout):
                down_steps.append(link.receive(Deadline.after(0.01)).message.stamp.step)
        assert link.stats().reconnects >= 2

    assert cuts == 5
    assert [event.envelope.message.stamp.step for event in up] == list(range(count))
    assert down_steps == list(range(count))
    for event in up[::3]:
        step = event.envelope.message.stamp.step
        np.testing.assert_array_equal(event.envelope.tensors["data"], array + step)


def test_restarted_coordinator_is_noticed(tmp_path: Path) -> None:
    """A coordinator that restarts does not know the session: SessionLost, then Hello again."""
    first = open_gateway(tmp_path)
    with open_link(first.address) as link:
        link.send(paused(1))
        collect(first, 1, Received)
        first.close()
        with open_gateway(tmp_path, first.address) as second:
            with pytest.raises(SessionLost):
                link.receive(Deadline.after(10))
            link.send(paused(2))
            events = collect(second, 1, Received)

    assert [type(event) for event in events] == [Joined, Received]
    assert events[1].envelope.message == paused(2)


def test_unreachable_coordinator_ends_patience(tmp_path: Path) -> None:
    """During a run an unreachable coordinator is retried for `patience_s`, then PeerGone."""
    gateway = open_gateway(tmp_path)
    config = LinkConfig(
        address=gateway.address, server_key=SERVER.public, keys=DEVICE, patience_s=1.0
    )
    with ZmqLink(config) as link:
        deadline = Deadline.after(10)
        while not link.name:
            assert not deadline.has_passed()
            time.sleep(0.02)
        gateway.close()
        begin_s = time.monotonic()
        with pytest.raises(PeerGone, match="nothing heard"):
            link.receive(Deadline.after(10))
        assert 0.5 < time.monotonic() - begin_s < 5.0


def test_a_coordinator_that_returns_with_another_key_is_told(tmp_path: Path) -> None:
    """The end of the patience names what may be wrong: the key, or who is behind the address."""
    gateway = open_gateway(tmp_path)
    config = LinkConfig(
        address=gateway.address, server_key=SERVER.public, keys=DEVICE, patience_s=3.0
    )
    with ZmqLink(config) as link:
        link.send(paused(0))
        collect(gateway, 1, Received)
        gateway.close()
        other = GatewayConfig(address=gateway.address, keys=make_key_pair())
        with (
            ZmqGateway(other, AllowList(tmp_path / "allowed.json")),
            pytest.raises(PeerGone, match="nothing heard.*wrong server key") as error,
        ):
            link.receive(Deadline.after(30))

    assert SERVER.public in str(error.value)


def test_heartbeats_measure_and_carry_telemetry(gateway: ZmqGateway) -> None:
    """Heartbeats bring the device's numbers to the coordinator and a round trip to the device."""
    config = LinkConfig(address=gateway.address, server_key=SERVER.public, keys=DEVICE, beat_s=0.05)
    with ZmqLink(config, telemetry=lambda: {"watts": 7.5}) as link:
        collect(gateway, 1, Joined)
        deadline = Deadline.after(10)
        while link.stats().rtt_s is None or not gateway.stats("d1").telemetry:
            assert not deadline.has_passed()
            time.sleep(0.02)
        assert gateway.stats("d1").telemetry == {"watts": 7.5}
        rtt_s = link.stats().rtt_s

    assert rtt_s is not None
    assert 0 < rtt_s < 1


def test_too_large_a_message_from_the_coordinator_is_an_error(gateway: ZmqGateway) -> None:
    """A message over the device's limit is reported, and the next one arrives."""
    with open_link(gateway.address) as link:
        collect(gateway, 1, Joined)
        link.set_limit(1000)
        time.sleep(0.1)
        big = {"data": (np.zeros(5000, np.uint8), "uint8")}
        gateway.send("d1", PartData(stamp=Stamp(), sha256="0" * 64, offset=0, total_bytes=1), big)
        gateway.send("d1", Pause(stamp=Stamp()))
        with pytest.raises(RemoteProtocolError, match="at most 1000"):
            link.receive(Deadline.after(5))
        assert link.receive(Deadline.after(5)).message == Pause(stamp=Stamp())


def test_slow_reader_stops_the_sender(gateway: ZmqGateway) -> None:
    """What a reader does not take stays at the sender, beyond a few windows' worth."""
    chunk = np.zeros(1 << 20, np.uint8)
    with open_link(gateway.address) as link:
        collect(gateway, 1, Joined)
        for step in range(90):
            link.send(Probe(stamp=Stamp(step=step)), {"data": (chunk, "uint8")})
        time.sleep(1.0)
        sent_bytes = link.stats().bytes_up
        events = collect(gateway, 90, Received)

    assert sent_bytes < 50 * (1 << 20)
    assert len(events) == 90


def test_memory_pair_checks_like_the_wire() -> None:
    """The link without a network delivers equal tensors and enforces types and sizes."""
    device, coordinator = memory_pair(max_message_bytes=3_000_000)
    array = np.arange(600_000, dtype=np.float32)

    device.send(AdapterUpload(stamp=Stamp()), {"x": (array, "float32")})
    got = coordinator.receive(Deadline.after(1))
    device.send(Probe(stamp=Stamp()), {"data": (np.zeros(3_000_001, np.uint8), "uint8")})
    device.send(paused(3))

    np.testing.assert_array_equal(got.tensors["x"], array)
    assert got.tensors["x"].flags.writeable
    assert not np.shares_memory(got.tensors["x"], array)
    with pytest.raises(RemoteProtocolError, match="at most 3000000"):
        coordinator.receive(Deadline.after(1))
    assert coordinator.receive(Deadline.after(1)).message == paused(3)
    with pytest.raises(LocalProtocolError, match="dtype"):
        device.send(paused(4), {"x": (array, "int32")})
    with pytest.raises(LocalProtocolError, match="not sent by this side"):
        coordinator.send(paused(4))
    coordinator.close()
    with pytest.raises(PeerGone):
        device.receive(Deadline.after(1))
