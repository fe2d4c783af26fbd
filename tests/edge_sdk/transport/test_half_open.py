"""Connections that look alive while their bytes are lost, and coordinators that come back."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Event, Joined, Received
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.deadline import Deadline
from edge_sdk.errors import ReceiveTimeout, SessionLost
from edge_sdk.protocol import packets
from edge_sdk.protocol.messages import FROM_DEVICE, Probe, Stamp
from edge_sdk.protocol.packets import Attach, Attached, AttachRequired, Lane
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.connection import REBUILD_FIRST_S, REBUILD_MOST_S, drawn
from edge_sdk.transport.keys import make_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.relay import BOTH, Direction, Relay

SERVER, DEVICE = make_key_pair(), make_key_pair()
SMALL, LARGE = 100, 1_600_000
PATIENCE_S = 60.0


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[ZmqGateway]:
    """An open gateway that knows `d1`."""
    allowed = AllowList(tmp_path / "allowed.json")
    allowed.register("d1", DEVICE.public)
    config = GatewayConfig(
        address="tcp://127.0.0.1:*", keys=SERVER, max_message_bytes=1 << 26, chunk_bytes=1 << 17
    )
    with ZmqGateway(config, allowed) as opened:
        yield opened


def open_link(address: str) -> ZmqLink:
    """A link that notices in a second what takes others twenty."""
    return ZmqLink(
        LinkConfig(
            address=address,
            server_key=SERVER.public,
            keys=DEVICE,
            beat_s=0.2,
            lifeless_s=1.0,
            chunk_bytes=1 << 17,
        )
    )


class Talk:
    """Numbered messages both ways; each side's must arrive once and in order."""

    def __init__(self, gateway: ZmqGateway, link: ZmqLink) -> None:
        self._gateway, self._link = gateway, link
        self._num_sent = 0
        self._up: list[int] = []
        self._down: list[int] = []

    def send(self, *sizes: int) -> None:
        """Send a message of each size both ways: those above 32 KiB take the bulk lane."""
        for size in sizes:
            tensors = {"data": (np.zeros(size, np.uint8), "uint8")}
            self._link.send(Probe(stamp=Stamp(step=self._num_sent)), tensors)
            self._gateway.send("d1", Probe(stamp=Stamp(step=self._num_sent)), tensors)
            self._num_sent += 1

    def step(self) -> None:
        """Take what has arrived."""
        events: list[Event] = self._gateway.events(0.01)
        up = [event for event in events if isinstance(event, Received)]
        self._up += [event.envelope.message.stamp.step for event in up]
        with contextlib.suppress(ReceiveTimeout):
            self._down.append(self._link.receive(Deadline.after(0.01)).message.stamp.step)

    def finish(self) -> None:
        """Wait until everything is there."""
        deadline = Deadline.after(PATIENCE_S)
        while len(self._up) < self._num_sent or len(self._down) < self._num_sent:
            assert not deadline.has_passed(), (self._up, self._down)
            self.step()
        assert self._up == self._down == list(range(self._num_sent))


def joined(gateway: ZmqGateway, link: ZmqLink) -> Talk:
    """Wait for the device, and until both of its lanes carry messages."""
    deadline = Deadline.after(PATIENCE_S)
    while not any(isinstance(event, Joined) for event in gateway.events(0.1)):
        assert not deadline.has_passed()
    talk = Talk(gateway, link)
    talk.send(SMALL, LARGE)
    talk.finish()
    return talk


ONE, OTHER = (0,), (1,)
SWALLOWED: list[tuple[tuple[int, ...] | None, tuple[Direction, ...]]] = [
    (None, BOTH),
    (ONE, BOTH),
    (OTHER, BOTH),
    (OTHER, ("up",)),
    (OTHER, ("down",)),
    (ONE, ("up",)),
    (ONE, ("down",)),
]


@pytest.mark.parametrize(("numbers", "directions"), SWALLOWED)
@pytest.mark.parametrize("when", ["idle", "busy"])
def test_swallowed_connections_are_built_anew(
    gateway: ZmqGateway,
    when: str,
    numbers: tuple[int, ...] | None,
    directions: tuple[Direction, ...],
) -> None:
    """Either connection, either way, at rest or in mid-message: all arrives once and in order."""
    with Relay(gateway.address) as relay, open_link(relay.address) as link:
        talk = joined(gateway, link)
        if when == "busy":
            seen = relay.num_bytes["up"] + relay.num_bytes["down"]
            talk.send(LARGE, SMALL, LARGE, SMALL, LARGE)
            while relay.num_bytes["up"] + relay.num_bytes["down"] < seen + LARGE:
                talk.step()
        relay.swallow(numbers=numbers, directions=directions)
        talk.send(SMALL, LARGE)
        talk.finish()


def test_swallowed_while_joining(gateway: ZmqGateway) -> None:
    """Bytes that are lost before the session is open delay it, and no more."""
    with Relay(gateway.address) as relay:
        relay.swallow(existing_only=False)
        with open_link(relay.address) as link:
            deadline = Deadline.after(PATIENCE_S)
            while relay.num_swallowed == 0:
                assert not deadline.has_passed()
                gateway.events(0.01)
            relay.swallow()
            relay.heal()
            relay.swallow()
            joined(gateway, link)


def test_everything_is_swallowed_for_a_while(gateway: ZmqGateway) -> None:
    """Also connections that are made meanwhile; once the way is open everything arrives."""
    with Relay(gateway.address) as relay, open_link(relay.address) as link:
        talk = joined(gateway, link)
        talk.send(LARGE, SMALL)
        before = relay.num_accepted
        relay.swallow(existing_only=False)
        talk.send(LARGE, SMALL)
        deadline = Deadline.after(PATIENCE_S)
        while relay.num_accepted < before + 2:  # it has noticed, and tries in vain
            assert not deadline.has_passed()
            talk.step()
        relay.heal()
        talk.finish()


def test_the_coordinator_can_ask_for_new_connections() -> None:
    """Told that nothing gets through on a lane, the device attaches both by other connections."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger, router.rcvtimeo = 0, 1000 * int(PATIENCE_S)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    routes: dict[Lane, list[bytes]] = {Lane.CONTROL: [], Lane.BULK: []}

    def attach_all(count: int) -> str:
        session = ""
        while any(len(each) < count for each in routes.values()):
            route, frame = router.recv_multipart()
            packet = packets.read_packet(memoryview(frame))
            control = packets.read_control(packet)
            if isinstance(control, Attach):
                routes[Lane(packet.lane)].append(route)
                session = control.session
                ack = Conversation(session, 1000, FROM_DEVICE).ack()
                answer = Attached(session=session, name="d", ack=ack)
                router.send_multipart([route, packets.control_frame(answer, packet.lane)])
        return session

    with ZmqLink(LinkConfig(address=f"tcp://127.0.0.1:{port}")):
        session = attach_all(1)
        ask = packets.control_frame(AttachRequired(session=session))
        router.send_multipart([routes[Lane.CONTROL][0], ask])
        attach_all(2)

    context.destroy(0)
    assert len({*routes[Lane.CONTROL], *routes[Lane.BULK]}) == 4


@pytest.mark.parametrize("downtime_s", [0.0, 10.0, 75.0, 3600.0])
def test_back_within_five_seconds_of_the_coordinators_return(downtime_s: float) -> None:
    """Whatever is drawn and however long it was away: the next try comes in time."""
    config = LinkConfig(address="")

    def tries(first_s: float, most_s: float) -> Iterator[float]:
        """Yield when libzmq tries: it doubles the pause up to the longest."""
        pause_s, at_s = first_s, 0.0
        for _ in itertools.count():
            at_s += pause_s
            yield at_s
            pause_s = min(2 * pause_s, most_s)

    for _ in range(100):
        for first_s, most_s in (
            (drawn(config.reconnect_s), drawn(config.reconnect_most_s)),
            (drawn(REBUILD_FIRST_S), REBUILD_MOST_S),
        ):
            next_s = next(at_s for at_s in tries(first_s, most_s) if at_s >= downtime_s)
            assert next_s - downtime_s <= 3.0


def test_back_with_the_settings_of_a_device(tmp_path: Path) -> None:
    """A coordinator that was away for a second is found again by itself."""
    allowed = AllowList(tmp_path / "allowed.json")
    allowed.register("d1", DEVICE.public)
    config = GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER, max_message_bytes=1 << 26)
    with contextlib.ExitStack() as stack:
        first = ZmqGateway(config, allowed)
        keys = LinkConfig(address=first.address, server_key=SERVER.public, keys=DEVICE)
        link = stack.enter_context(ZmqLink(keys))
        joined(first, link)
        first.close()
        time.sleep(1.0)
        again = dataclasses.replace(config, address=first.address)
        second = stack.enter_context(ZmqGateway(again, allowed))
        with pytest.raises(SessionLost):
            link.receive(Deadline.after(PATIENCE_S))
        joined(second, link)


def test_a_fleet_does_not_dial_at_one_moment() -> None:
    """Pauses are spread over half of their length."""
    pauses = sorted(drawn(4.0) for _ in range(1000))

    assert 2.0 <= pauses[0] < 2.1
    assert 3.9 < pauses[-1] <= 4.0
