"""The gateway over real sockets: one device's faults are its own, and identity is the key."""

from __future__ import annotations

import re
import secrets
import time

import numpy as np
import pytest
import zmq

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Event, Joined, Left, Received, Rejected, Silent
from coordinator.gateway.io_thread import GatewayIo
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.sessions import DeviceSession
from edge_sdk.deadline import Deadline
from edge_sdk.errors import ConfigError, LocalProtocolError, PeerGone, RefusedError, SessionLost
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import OutgoingMessage
from edge_sdk.protocol.messages import (
    AdapterUpload,
    Failure,
    Goodbye,
    Pause,
    Paused,
    Refused,
    Stamp,
)
from edge_sdk.protocol.packets import Attach, Kind, Lane, Packet
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.keys import KeyPair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.coordinator.gateway.conftest import ONE, SERVER, TWO

PAUSED = Paused(stamp=Stamp(step=1))


def open_link(gateway: ZmqGateway, keys: KeyPair = ONE) -> ZmqLink:
    """Return a link with quick heartbeats."""
    return ZmqLink(
        LinkConfig(address=gateway.address, server_key=SERVER.public, keys=keys, beat_s=0.1)
    )


def until(gateway: ZmqGateway, kind: type, seconds: float = 10.0) -> list[Event]:
    """Return events up to and including the first of *kind*."""
    deadline, found = Deadline.after(seconds), []
    while not any(isinstance(event, kind) for event in found):
        assert not deadline.has_passed(), found
        found += gateway.events(0.2)
    return found


class RawDevice:
    """A device that says whatever a test wants, with a registered key."""

    def __init__(
        self, gateway: ZmqGateway, keys: KeyPair, *, is_attached: bool = True, address: str = ""
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 5000
        self.socket.curve_serverkey = SERVER.public.encode()
        self.socket.curve_publickey = keys.public.encode()
        self.socket.curve_secretkey = keys.secret.encode()
        self.socket.connect(address or gateway.address)
        self.talk = Conversation(secrets.token_hex(16), 10**6)
        if is_attached:
            self.attach()
            assert type(self.read()).__name__ == "Attached"

    def attach(self) -> None:
        """Open a session, on the control lane only."""
        control = Attach(
            session=self.talk.session,
            is_resumed=False,
            sdk_version="",
            name="",
            ack=self.talk.ack(),
        )
        self.socket.send(packets.control_frame(control, Lane.CONTROL, self.talk.tag))

    def read(self) -> object:
        """Return the next control frame, or message of a data packet."""
        packet = packets.read_packet(memoryview(self.socket.recv()))
        if packet.kind == Kind.CONTROL:
            return packets.read_control(packet)
        return self.talk.on_packet(packet)[0].message  # type: ignore[union-attr]

    def read_until(self, kind: type) -> object:
        """Return the next thing of *kind*."""
        while True:
            thing = self.read()
            if isinstance(thing, kind):
                return thing

    def first(self, payload: bytes, seq: int = 0, place: int = 0) -> bytes:
        """Return a FIRST packet."""
        return packets.prefix(Kind.FIRST, 0, self.talk.tag, seq, place, len(payload)) + payload

    def __enter__(self) -> RawDevice:
        return self

    def close(self) -> None:
        """Go without a word."""
        self._context.destroy(0)

    def __exit__(self, *_: object) -> None:
        self.close()


def good_head() -> bytes:
    """Return header and padding of a message with one tensor of 12 bytes."""
    return OutgoingMessage(
        AdapterUpload(stamp=Stamp(step=1)), {"x": (np.zeros(3, np.float32), "float32")}
    ).head


GARBAGE = {
    "wrong version": lambda raw: b"\x97\x63" + raw.first(good_head() + bytes(12))[2:],
    "not a packet": lambda raw: b"hello",
    "empty": lambda raw: b"",
    "truncated bin": lambda raw: raw.first(good_head() + bytes(12))[:-5],
    "bad header": lambda raw: raw.first(packets.first_head(b"\xc1" * 9)),
    "oversize header": lambda raw: raw.first(packets.first_head(bytes(65_537))),
    "header beyond packet": lambda raw: raw.first(b"\xff\xff\xff\xff" + bytes(20)),
    "wrong codec": lambda raw: raw.first(good_head().replace(b"x\x00\x91\x03", b"x\x63\x91\x03")),
    "chunk too long": lambda raw: raw.first(good_head() + bytes(13)),
    "too large": lambda raw: raw.first(good_head().replace(b"\x91\x03", b"\x91\x7f") + bytes(12)),
    "bad note": lambda raw: (
        packets.prefix(Kind.CONTROL, 0, raw.talk.tag, 0, 0, 3) + b"\x92\x01\x02"
    ),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_gets_a_typed_error_and_hurts_nobody_else(gateway: ZmqGateway, name: str) -> None:
    """A bad frame is answered with a Failure and reported; the other device goes on."""
    with RawDevice(gateway, ONE) as raw:
        with open_link(gateway, TWO) as link:
            gateway.set_limits("one", 200)
            time.sleep(0.05)
            raw.socket.send(GARBAGE[name](raw))
            events = until(gateway, Rejected)
            failure = raw.read_until(Failure)
            link.send(PAUSED)
            events += until(gateway, Received)

        assert [event.device for event in events if isinstance(event, Rejected)] == ["one"]
        assert [event.device for event in events if isinstance(event, Received)] == ["two"]
        assert isinstance(failure, Failure)
        assert failure.error == "RemoteProtocolError"


def test_a_message_in_several_parts_ends_the_session(gateway: ZmqGateway) -> None:
    """No device of ours sends one; others go on."""
    with RawDevice(gateway, ONE) as raw, open_link(gateway, TWO) as link:
        raw.socket.send_multipart([b"x"] * 50)
        events = until(gateway, Left)
        link.send(PAUSED)
        events += until(gateway, Received)

    assert [e.device for e in events if isinstance(e, (Left, Received))] == ["one", "two"]


def test_garbage_before_attaching_is_answered(gateway: ZmqGateway) -> None:
    """A known key that sends garbage first, or data before attaching, gets a control frame back."""
    with RawDevice(gateway, ONE, is_attached=False) as raw:
        raw.socket.send(b"garbage")
        assert isinstance(raw.read(), packets.Closed)
        raw.socket.send(raw.first(good_head()))
        assert isinstance(raw.read(), packets.AttachRequired)

        assert until(gateway, Rejected)[0].device == "one"


def test_endless_garbage_ends_the_session(gateway: ZmqGateway) -> None:
    """A device that sends nothing but garbage is thrown out, so its answers stay bounded."""
    with RawDevice(gateway, ONE) as raw:
        for _ in range(20):
            raw.socket.send(b"garbage")

        events = until(gateway, Left)

        assert 1 <= sum(isinstance(event, Rejected) for event in events) <= 20
        assert "too many bad messages" in [e for e in events if isinstance(e, Left)][0].reason


def test_broken_channel_rules_end_the_session(gateway: ZmqGateway) -> None:
    """A device that acks what was never sent is reported and has left."""
    with RawDevice(gateway, ONE) as raw:
        control = packets.Ack(control_next=9, control_credit=0, bulk_next=0, bulk_credit=0)
        raw.socket.send(packets.control_frame(control, tag=raw.talk.tag))

        events = until(gateway, Left)

        assert any(isinstance(event, Rejected) for event in events)


def test_dropped_device_gets_what_was_queued_and_the_reason(gateway: ZmqGateway) -> None:
    """`drop` flushes, then the device's link ends with the reason."""
    with open_link(gateway) as link:
        until(gateway, Joined)
        gateway.send("one", Refused(stamp=Stamp(), reason="wrong model"))
        gateway.drop("one", "wrong model")
        assert link.receive(Deadline.after(30)).message.reason == "wrong model"
        with pytest.raises(RefusedError, match="wrong model"):
            link.receive(Deadline.after(30))
        events = until(gateway, Left)

    assert events[-1] == Left("one", "wrong model")
    with pytest.raises(PeerGone, match="no session"):
        gateway.send("one", Pause(stamp=Stamp()))


def test_a_device_that_speaks_hears_first_why_it_was_dropped(gateway: ZmqGateway) -> None:
    """What it sends after the end raises nothing before it has received the last words."""
    with open_link(gateway) as link:
        until(gateway, Joined)
        gateway.send("one", Refused(stamp=Stamp(), reason="the last words"))
        gateway.drop("one", "dropped")
        until(gateway, Left)  # it has confirmed them

        deadline = Deadline.after(30)
        while link._io.dead is None:
            assert deadline.left_s()
            time.sleep(0.01)
        link.send(Goodbye(stamp=Stamp(), reason="stopped"))

        assert link.receive(Deadline.after(30)).message.reason == "the last words"
        with pytest.raises(RefusedError, match="dropped"):
            link.receive(Deadline.after(30))


def test_revoked_key_ends_a_live_session(gateway: ZmqGateway, allowed: AllowList) -> None:
    """Unregistering a device ends its session although its connection is alive."""
    with open_link(gateway) as link:
        until(gateway, Joined)
        AllowList(allowed.path).unregister("one")
        with pytest.raises(RefusedError, match="not registered any more"):
            link.receive(Deadline.after(30))
        events = until(gateway, Left)

    assert events[-1].device == "one"


def test_a_forgotten_device_may_greet_anew(gateway: ZmqGateway) -> None:
    """Its link hears that the session is lost, not that it is closed, and opens another one."""
    with open_link(gateway) as link:
        until(gateway, Joined)
        gateway.forget("one", "hangs")
        with pytest.raises(SessionLost):
            link.receive(Deadline.after(30))
        left, joined = until(gateway, Joined)

    assert left == Left("one", "hangs")
    assert isinstance(joined, Joined)


def test_a_device_that_speaks_seldom_is_asked_before_it_is_lost(allowed: AllowList) -> None:
    """A patience below the time between two heartbeats loses nobody whose link lives."""
    config = GatewayConfig(
        address="tcp://127.0.0.1:*", keys=SERVER, silent_after_s=1.5, gone_after_s=3.0
    )
    with ZmqGateway(config, allowed) as gateway:
        keys = LinkConfig(address=gateway.address, server_key=SERVER.public, keys=ONE, beat_s=600.0)
        with ZmqLink(keys):
            until(gateway, Joined)
            deadline, events = Deadline.after(1.5 * config.gone_after_s), list[Event]()
            while deadline.left_s():
                events += gateway.events(deadline.left_s())

            assert gateway.devices() == ["one"]
    assert not any(isinstance(event, Left) for event in events)


def test_silence_is_reported_and_ends_in_left(allowed: AllowList) -> None:
    """A device that says nothing is reported silent, and after a while it has left."""
    config = GatewayConfig(
        address="tcp://127.0.0.1:*", keys=SERVER, silent_after_s=0.4, gone_after_s=1.2
    )
    with ZmqGateway(config, allowed) as gateway, RawDevice(gateway, ONE):
        events = until(gateway, Left)

    assert isinstance(events[0], Joined)
    silent = [event.seconds for event in events[1:-1] if isinstance(event, Silent)]
    assert len(silent) == len(events) - 2 >= 1
    assert silent[0] >= 0.4


def test_wake_interrupts_events(gateway: ZmqGateway) -> None:
    """Another thread can make `events` return early."""
    gateway.wake()
    begin_s = time.monotonic()

    assert gateway.events(5.0) == []
    assert time.monotonic() - begin_s < 1.0


def test_taken_port_is_a_config_error(gateway: ZmqGateway, allowed: AllowList) -> None:
    """A port that is in use is named, and leaves nothing open."""
    with pytest.raises(ConfigError, match=re.escape(gateway.address)):
        ZmqGateway(GatewayConfig(address=gateway.address, keys=SERVER), allowed)


def test_gateway_needs_keys_unless_told_otherwise() -> None:
    """There is no accidental gateway without encryption."""
    with pytest.raises(ConfigError, match="insecure=True"):
        ZmqGateway(GatewayConfig(address="tcp://127.0.0.1:*"))


def test_insecure_gateway_takes_the_name_from_the_device() -> None:
    """For benchmarks: without CURVE a device is who it says it is, if the name is plain."""
    opened = ZmqGateway(GatewayConfig(address="tcp://127.0.0.1:*", insecure=True))
    with opened as gateway, ZmqLink(LinkConfig(address=gateway.address, name="bench")) as link:
        link.send(PAUSED)
        events = until(gateway, Received)
        assert gateway.devices() == ["bench"]

    assert events[0].device == "bench"


def test_gateway_sends_only_its_own_messages(gateway: ZmqGateway) -> None:
    """A device's message is not sent by the coordinator."""
    with pytest.raises(LocalProtocolError, match="Paused"):
        gateway.send("one", PAUSED)  # type: ignore[arg-type]


def test_a_packet_that_nobody_foresaw_ends_one_session(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device joins again; the others, and the thread of the gateway, go on."""
    on_data = GatewayIo._on_data
    raised: list[str] = []

    def fail(self: GatewayIo, session: DeviceSession, packet: Packet, now_s: float) -> None:
        if session.name == "one" and not raised:
            raised.append(session.name)
            raise KeyError("nobody foresaw it")
        on_data(self, session, packet, now_s)

    monkeypatch.setattr(GatewayIo, "_on_data", fail)
    with open_link(gateway) as one, open_link(gateway, TWO) as two:
        one.send(PAUSED)
        [left] = [e for e in until(gateway, Left, 30.0) if isinstance(e, Left)]
        with pytest.raises(SessionLost):
            one.receive(Deadline.after(30.0))
        one.send(PAUSED)
        [received] = [e for e in until(gateway, Received, 30.0) if isinstance(e, Received)]
        two.send(PAUSED)
        until(gateway, Received, 30.0)

    assert (left.device, left.reason) == ("one", "KeyError: 'nobody foresaw it'")
    assert received.device == "one"
