"""A lane, and two lanes together: everything once, in order, whatever the connection does."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol import packets
from edge_sdk.protocol.channel import WINDOW_BYTES, Receiver, Sender
from edge_sdk.protocol.fragments import BULK_FROM_BYTES, Envelope, OutgoingMessage
from edge_sdk.protocol.messages import Paused, Probe, Stamp
from edge_sdk.protocol.packets import Kind, Lane
from edge_sdk.protocol.session import QUEUED_LARGEST, BadMessage, Conversation

WINDOW = 4096
SESSION = "ab" * 16


class Box:
    """Cargo of equal packets."""

    def __init__(self, num_packets: int, size: int = 1000) -> None:
        self.num_packets = num_packets
        self.size = size

    def packet_bytes(self, number: int) -> int:
        """Return the size of any packet."""
        return self.size


def drain(sender: Sender, now_s: float = 0.0) -> list[int]:
    """Send all that may be sent and return the numbers."""
    numbers = []
    due = sender.peek(now_s)
    while due is not None:
        sender.sent(due)
        numbers.append(due.seq)
        due = sender.peek(now_s)
    return numbers


def test_window_bounds_what_is_in_flight() -> None:
    """No more than the window is ever under way, and acks open it again."""
    sender = Sender(window_bytes=3500)
    sender.queue(Box(10), 0)

    assert drain(sender) == [0, 1, 2]
    sender.on_ack(2, 10_000, 0.0)
    assert drain(sender) == [3, 4]
    assert 1000 * (5 - sender.acked_seq) == 3000


def test_credit_stops_a_sender_whose_peer_does_not_read() -> None:
    """Acked packets do not help while the application holds what has arrived."""
    sender, receiver = Sender(3000), Receiver(3000)
    sender.queue(Box(10), 0)
    for seq in drain(sender):
        receiver.accept(seq, 1000)
    receiver.hold(6000)

    sender.on_ack(receiver.next_seq, receiver.credit, 0.0)
    stopped = drain(sender)
    receiver.release(6000)
    sender.on_ack(receiver.next_seq, receiver.credit, 0.0)

    assert stopped == []
    assert drain(sender) == [3, 4, 5]


def test_stuck_sender_starts_again_from_the_last_ack() -> None:
    """Without progress it is stuck, after ever longer; a new connection repeats what is left."""
    sender = Sender(resend_after_s=10.0)
    sender.queue(Box(4), 0)
    drain(sender, now_s=0.0)
    sender.on_ack(1, 10**9, 5.0)

    assert not sender.is_stuck(14.0)
    assert sender.is_stuck(15.0)
    assert not sender.is_stuck(34.0)
    assert sender.is_stuck(35.0)
    sender.rewind()  # as a new connection does
    assert drain(sender, 36.0) == [1, 2, 3]
    assert sender.num_resent == 3
    assert not sender.is_stuck(75.0)
    assert sender.is_stuck(76.0)


def test_late_ack_after_a_rewind_moves_on() -> None:
    """An ack that overtakes a resend ends it: nothing acked is sent again."""
    sender = Sender()
    sender.queue(Box(2), 0)
    sender.queue(Box(2), 1)
    drain(sender)
    sender.rewind()

    sender.on_ack(3, 0, 1.0)

    assert drain(sender) == [3]
    sender.on_ack(4, 0, 1.0)
    assert sender.is_idle


def test_peer_may_not_ack_what_was_not_sent_or_send_without_credit() -> None:
    """Acks from the future and packets beyond the credit are protocol errors."""
    with pytest.raises(RemoteProtocolError, match="ack of packet"):
        Sender().on_ack(1, 0, 0.0)
    with pytest.raises(RemoteProtocolError, match="allowed were"):
        Receiver(1000).accept(0, 1001)


def message(number: int, size: int) -> tuple[Any, OutgoingMessage]:
    """Return a message that knows its number, with *size* bytes of tensor."""
    sent = Probe(stamp=Stamp(step=number))
    array = np.full(size, number % 251, np.uint8)
    return sent, OutgoingMessage(sent, {"data": (array, "uint8")} if size else {}, 1024)


class Link:
    """Carries frames between two conversations and mistreats them."""

    def __init__(self, seed: int, badness: float) -> None:
        self.random = random.Random(seed)
        self.badness = badness
        self.ends = [Conversation(SESSION, 10**6, window_bytes=WINDOW) for _ in range(2)]
        self.wires: list[list[Any]] = [[], []]
        self.arrived: list[list[Any]] = [[], []]

    def step(self, now_s: float) -> None:
        """Let both ends send, lose, double and reorder, then deliver some of it."""
        for side in (0, 1):
            talk = self.ends[side]
            for lane in Lane:
                due = talk.senders[lane].peek(now_s)
                if due is not None:
                    self.throw(side, bytes(talk.frame(lane, due)))
                    talk.senders[lane].sent(due)
                talk.senders[lane].is_stuck(now_s)
            if talk.owes_ack:
                self.throw(side, talk.ack())
        for side in (0, 1):
            while self.wires[side] and self.random.random() < 0.9:
                self.deliver(1 - side, self.wires[side].pop(0), now_s)

    def throw(self, side: int, frame: Any) -> None:
        """Put a frame on the wire, if it is lucky."""
        chance = self.random.random()
        if chance < self.badness / 2:
            return
        wire = self.wires[side]
        wire.append(frame)
        if chance < self.badness:
            wire.append(frame)
        if chance > 1 - self.badness:
            self.random.shuffle(wire)

    def deliver(self, side: int, frame: Any, now_s: float) -> None:
        """Hand a frame over."""
        talk = self.ends[side]
        if isinstance(frame, packets.Ack):
            talk.on_ack(frame, now_s)
            return
        for item in talk.on_packet(packets.read_packet(memoryview(frame))):
            assert isinstance(item, Envelope), item
            assert all((a == item.message.stamp.step % 251).all() for a in item.tensors.values())
            self.arrived[side].append(item.message)
            talk.taken(item.lane, item.num_bytes)

    def reconnect(self, now_s: float) -> None:
        """Lose what is under way and tell both ends."""
        self.wires = [[], []]
        for lane in Lane:
            for side in (0, 1):
                self.ends[side].on_attach(lane, self.ends[1 - side].ack(), now_s)


@given(
    seed=st.integers(0, 2**32),
    badness=st.sampled_from([0.0, 0.05, 0.3]),
    sizes=st.lists(st.sampled_from([0, 10, 1024, 5000, BULK_FROM_BYTES + 1, 60_000]), max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_everything_arrives_once_and_in_order(seed: int, badness: float, sizes: list[int]) -> None:
    """Over a link that loses, doubles, reorders and breaks, both sides get all, once, in order."""
    link = Link(seed, badness)
    sent: list[list[Any]] = [[], []]
    for number, size in enumerate(sizes):
        for side in (0, 1):
            one, outgoing = message(number, size)
            link.ends[side].send(outgoing)
            sent[side].append(one)

    for turn in range(20_000):
        now_s = turn * 0.5
        link.step(now_s)
        if badness and link.random.random() < 0.01:
            link.reconnect(now_s)
        if link.ends[0].is_idle and link.ends[1].is_idle:
            break

    assert link.arrived == [sent[1], sent[0]]
    assert link.ends[0].is_idle
    assert link.ends[1].is_idle


def test_small_message_waits_for_the_large_one_before_it() -> None:
    """Messages are handed out in the order sent, also when the control lane is faster."""
    ours, theirs = (Conversation(SESSION, 10**6) for _ in range(2))
    large, small = message(0, BULK_FROM_BYTES + 1), message(1, 0)
    assert ours.send(large[1]) == Lane.BULK
    assert ours.send(small[1]) == Lane.CONTROL

    got = []
    for lane in (Lane.CONTROL, Lane.BULK):
        due = ours.senders[lane].peek(0.0)
        while due is not None:
            frame = memoryview(bytes(ours.frame(lane, due)))
            got.append([item.message for item in theirs.on_packet(packets.read_packet(frame))])  # type: ignore[union-attr]
            ours.senders[lane].sent(due)
            due = ours.senders[lane].peek(0.0)

    assert got[0] == []
    assert got[-1] == [large[0], small[0]]


def test_bad_message_is_skipped_and_the_next_arrives() -> None:
    """A message over the limit is reported in its place; those after it are not hurt."""
    ours, theirs = Conversation(SESSION, 10**6), Conversation(SESSION, 3000)
    for number, size in enumerate((5000, 10)):
        ours.send(message(number, size)[1])

    got: list[Any] = []
    due = ours.senders[0].peek(0.0)
    while due is not None:
        got += theirs.on_packet(packets.read_packet(memoryview(bytes(ours.frame(0, due)))))
        ours.senders[0].sent(due)
        due = ours.senders[0].peek(0.0)

    assert isinstance(got[0], BadMessage)
    assert got[1].message.stamp.step == 1
    assert len(got) == 2


def test_messages_that_wait_are_kept_as_they_came_and_bounded() -> None:
    """Whoever never sends the first one ends the session long before it fills the memory."""
    theirs = Conversation(SESSION, 1 << 20)
    head = message(0, 10)[1].head
    size, counts = len(head) + 10, []

    def send_all_but_the_first() -> None:
        for seq in range(1_000_000):
            frame = packets.prefix(Kind.FIRST, 0, theirs.tag, seq, seq + 1, size) + head + bytes(10)
            assert theirs.on_packet(packets.read_packet(memoryview(frame))) == []
            theirs.ack()
            counts.append(seq)

    with pytest.raises(RemoteProtocolError, match="wait for message 0|allowed were|out of order"):
        send_all_but_the_first()

    assert len(counts) * size < 2 * WINDOW_BYTES


def test_a_bad_message_is_told_of_before_its_turn() -> None:
    """It is counted at once, though the first one never comes; a good one waits."""
    theirs = Conversation(SESSION, 1 << 20)
    for seq, payload in enumerate((message(1, 10)[1].head + bytes(10), b"garbage")):
        frame = packets.prefix(Kind.FIRST, 0, theirs.tag, seq, seq + 1, len(payload)) + payload
        got = theirs.on_packet(packets.read_packet(memoryview(frame)))
        assert [type(item) for item in got] == [BadMessage] * seq


def test_what_the_peer_has_not_got_is_counted() -> None:
    """From the queueing to the ack; who takes nothing and asks on is over what may wait."""
    ours, theirs = (Conversation(SESSION, 10**9) for _ in range(2))
    ours.send(message(0, 1000)[1])
    assert 1000 < ours.queued_bytes < 3000
    due = ours.senders[0].peek(0.0)
    assert due is not None
    frame = memoryview(bytes(ours.frame(0, due)))
    ours.senders[0].sent(due)
    theirs.on_packet(packets.read_packet(frame))
    ours.on_ack(theirs.ack(), 0.0)
    assert ours.queued_bytes == 0

    for number in range(QUEUED_LARGEST):
        ours.send(message(number, 100 << 20)[1])
    assert not ours.is_overfull
    ours.send(message(9, 100 << 20)[1])
    assert ours.is_overfull


def test_queued_messages_are_not_copied() -> None:
    """A message waits as a reference to its array; bytes are made packet by packet."""
    array = np.zeros(1 << 20, np.float32)

    outgoing = OutgoingMessage(Paused(stamp=Stamp()), {"a": (array, "float32")})

    assert any(np.shares_memory(row, array) for row, _ in outgoing._rows)
