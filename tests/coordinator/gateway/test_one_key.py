"""One key, one device: who has the name when two want it, and when a session stops to count."""

from __future__ import annotations

import pytest

from coordinator.gateway import io_thread
from coordinator.gateway.gateway import ZmqGateway
from coordinator.gateway.interface import Event, Joined, Left, Received, Rejected
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.deadline import Deadline
from edge_sdk.errors import RefusedError, SessionLost
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import OutgoingMessage
from edge_sdk.protocol.messages import Pause, Refused, Stamp
from edge_sdk.protocol.packets import AttachRequired, Closed
from edge_sdk.transport.keys import make_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.coordinator.gateway.conftest import ONE, SERVER
from tests.coordinator.gateway.test_gateway import (
    PAUSED,
    RawDevice,
    open_link,
    until,
)
from tests.e2e.relay import Relay

PATIENCE_S = 60.0


def said(gateway: ZmqGateway, link: ZmqLink) -> list[Event]:
    """Let the device say something, and return the events up to it."""
    link.send(PAUSED)
    return until(gateway, Received, PATIENCE_S)


def test_a_second_board_with_the_same_key_is_refused(gateway: ZmqGateway) -> None:
    """It is told since when and from where the first is connected; the first does not notice."""
    with open_link(gateway) as first:
        said(gateway, first)
        for _ in range(2):  # as often as it is started
            second = open_link(gateway)
            with second, pytest.raises(RefusedError) as error:
                second.receive(Deadline.after(PATIENCE_S))
        events = said(gateway, first)

    assert "connected from 127.0.0.1 since 20" in str(error.value)
    assert error.value.exit_code == 4
    assert [type(event) for event in events] == [Received]


def test_a_killed_device_is_followed_at_once(gateway: ZmqGateway) -> None:
    """Its kernel has closed the connection: nobody is waited for, however soon it comes."""
    for _ in range(5):
        with RawDevice(gateway, ONE):
            until(gateway, Joined)
        began = Deadline.after(0.0)
        with open_link(gateway) as link:
            said(gateway, link)
            assert began.at_s + io_thread.ANSWER_S > Deadline.after(0.0).at_s


@pytest.mark.parametrize("how", ["swallowed", "mute", "silent"])
def test_who_does_not_answer_gives_way(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A connection that only looks alive, a process that hangs: the successor gets the name."""
    monkeypatch.setattr(io_thread, "SILENT_S", 0.0 if how == "silent" else 3600.0)
    monkeypatch.setattr(io_thread, "ANSWER_S", 3600.0 if how == "silent" else 0.5)
    with Relay(gateway.address) as relay, RawDevice(gateway, ONE, address=relay.address) as raw:
        until(gateway, Joined)
        if how == "swallowed":
            relay.swallow()
            raw.close()
        with open_link(gateway) as link:
            events = said(gateway, link)
            assert gateway.devices() == ["one"]

    assert [type(event) for event in events] == [Left, Joined, Received]


def test_a_device_that_was_followed_is_told_when_it_wakes(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends for good: there is another one now."""
    monkeypatch.setattr(io_thread, "SILENT_S", 0.0)
    with RawDevice(gateway, ONE) as raw, open_link(gateway) as link:
        said(gateway, link)
        raw.attach()
        closed = raw.read_until(Closed)

    assert isinstance(closed, Closed)
    assert "another process with the same key" in closed.reason


def test_nothing_of_a_dropped_device_is_an_event(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment of the drop: neither what was on its way nor what comes while it is told."""
    monkeypatch.setattr(io_thread, "CHECK_S", 0.1)
    monkeypatch.setattr(io_thread, "LONG_FLUSH_S", 1.0)
    with RawDevice(gateway, ONE) as raw:
        until(gateway, Joined)
        for seq in range(2):
            raw.socket.send(raw.first(OutgoingMessage(PAUSED, {}).head, seq, seq))
        until(gateway, Received)
        gateway.send("one", Pause(stamp=Stamp()))  # not acked, so that it is waited for
        gateway.drop("one", "no good")
        raw.socket.send(raw.first(OutgoingMessage(PAUSED, {}).head, 2, 2))
        raw.socket.send(b"garbage")
        events = until(gateway, Left, PATIENCE_S)

    assert events == [Left("one", "no good")]


def test_the_last_words_reach_a_device_whose_link_has_just_gone_dead(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for until it has noticed that and connected anew."""
    monkeypatch.setattr(io_thread, "DROP_FLUSH_S", 0.1)
    with Relay(gateway.address) as relay:
        config = LinkConfig(
            address=relay.address,
            server_key=SERVER.public,
            keys=ONE,
            beat_s=0.2,
            lifeless_s=1.0,
        )
        with ZmqLink(config) as link:
            said(gateway, link)
            relay.swallow()
            gateway.send("one", Refused(stamp=Stamp(), reason="over"))
            gateway.drop("one", "over")

            assert link.receive(Deadline.after(PATIENCE_S)).message.reason == "over"
            events = until(gateway, Left, PATIENCE_S)

    assert events == [Left("one", "over")]


def test_a_dropped_device_whose_process_has_ended_is_not_waited_for(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody acks what was queued, and nobody ever will."""
    monkeypatch.setattr(io_thread, "CHECK_S", 0.1)
    monkeypatch.setattr(io_thread, "LONG_FLUSH_S", 3600.0)
    with RawDevice(gateway, ONE):
        until(gateway, Joined)
        gateway.send("one", Pause(stamp=Stamp()))
        gateway.drop("one", "over")

    assert until(gateway, Left, PATIENCE_S) == [Left("one", "over")]


def test_a_dropped_device_comes_back_at_once(gateway: ZmqGateway) -> None:
    """The session that is being ended does not stand in the way of the next."""
    with RawDevice(gateway, ONE) as raw:
        until(gateway, Joined)
        gateway.send("one", Pause(stamp=Stamp()))  # not acked
        gateway.drop("one", "no good")
        with open_link(gateway) as link:
            events = said(gateway, link)
        assert isinstance(raw.read_until(Closed), Closed)

    assert [type(event) for event in events] == [Left, Joined, Received]
    assert events[0] == Left("one", "no good")


def test_a_replaced_key_ends_the_session_of_the_old_one(
    gateway: ZmqGateway, allowed: AllowList
) -> None:
    """Also one that says nothing: the name is another device's now."""
    new = make_key_pair()
    with RawDevice(gateway, ONE) as raw:
        until(gateway, Joined)
        AllowList(allowed.path).register("one", new.public)
        closed = raw.read_until(Closed)
        events = until(gateway, Left)
        with open_link(gateway, new) as link:
            events += said(gateway, link)

    assert isinstance(closed, Closed)
    assert "not registered any more" in closed.reason
    assert [type(event) for event in events] == [Left, Joined, Received]


def test_while_nobody_knows_who_may_come_devices_wait(
    gateway: ZmqGateway, allowed: AllowList, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that may not be read ends all sessions and lets nobody in; later all are back."""
    with open_link(gateway) as link:
        said(gateway, link)
        with monkeypatch.context() as patch:
            patch.setattr(allowed, "_read", lambda: None)
            left = until(gateway, Left, PATIENCE_S)
            assert gateway.events(1.0) == []
        with pytest.raises(SessionLost):
            link.receive(Deadline.after(PATIENCE_S))
        events = said(gateway, link)

    assert isinstance(left[-1], Left)
    assert "cannot be read" in left[-1].reason
    assert [type(event) for event in events] == [Joined, Received]


def test_a_device_to_which_nothing_gets_through_is_asked_to_connect_anew(
    gateway: ZmqGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only it can dial; the control frame names the session, else it means something else."""
    monkeypatch.setattr(io_thread, "CHECK_S", 0.1)
    with RawDevice(gateway, ONE) as raw:
        until(gateway, Joined)
        monkeypatch.setattr("edge_sdk.protocol.channel.Sender.is_stuck", lambda *_: True)
        asked = raw.read_until(AttachRequired)

    assert asked == AttachRequired(session=raw.talk.session)


def test_frames_without_a_session_are_answered_and_seldom_told(gateway: ZmqGateway) -> None:
    """A device that sends garbage before it attaches makes one event, not one a frame."""
    with RawDevice(gateway, ONE, is_attached=False) as raw:
        for _ in range(50):
            raw.socket.send(b"garbage")
            assert isinstance(raw.read(), packets.Closed)
        raw.attach()
        events = until(gateway, Joined)

    assert [type(event) for event in events] == [Rejected, Joined]
