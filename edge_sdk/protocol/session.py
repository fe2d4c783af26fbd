"""Two lanes made one stream of messages: what each side keeps for a session.

Pure, like `channel.py`. Not here: sockets and who the peer is (`transport/io_thread.py`, the
coordinator's `coordinator/gateway/io_thread.py`).

Every message has a number in its session. It travels on one lane; the receiver hands messages out
by number, whichever lane was faster.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol import packets
from edge_sdk.protocol.channel import WINDOW_BYTES, PacketsDue, Receiver, Sender
from edge_sdk.protocol.codecs import Bytes
from edge_sdk.protocol.fragments import Envelope, OutgoingMessage, PackedMessage, Reassembler
from edge_sdk.protocol.packets import PREFIX_BYTES, Ack, Kind, Lane, Packet

# Messages that overtook an earlier one, which takes the other lane, wait for it as they came.
# Credit bounds what an honest peer lets wait, this one that never sends the earlier one.
MAX_AHEAD = 4096
WAITING_WINDOWS = 4
# What a header takes once it is read, at most: so many times its bytes, and the message itself.
READ_HEADER_SHARE, MESSAGE_BYTES = 16, 1024
# What may wait for the peer's ack, besides three of the largest message there was: starts of rounds
# that were superseded on a slow link. Whoever asks on and acks nothing is over it.
QUEUED_BYTES, QUEUED_LARGEST = 64 * 1024 * 1024, 3
# Buffers kept for the next chunks: fresh ones would cost a page fault per 4 KiB. An idle session
# keeps none.
SPARE_BUFFERS = 4
# Smaller packets are copied into libzmq anyway, and malloc has them at hand.
REUSE_FROM_BYTES = 128 * 1024
_BUFFER_BYTES = PREFIX_BYTES + packets.MAX_CHUNK_BYTES + 4096


class _Buffers:
    """Memory for the frames of one lane; reused only when libzmq is certain to be done with it.

    That is when the peer has acked a packet that was sent just once: then the peer has all of it.
    After a rewind a second copy may lie in some queue, so nothing lent before comes back.
    """

    def __init__(self) -> None:
        self._lent: deque[tuple[int, Bytes]] = deque()
        self._spare: list[Bytes] = []
        self._num_rewinds = 0

    def take(self, sender: Sender, due: PacketsDue, size: int) -> Bytes:
        """Return memory for *size* bytes."""
        is_small = not REUSE_FROM_BYTES <= size <= _BUFFER_BYTES
        if is_small or not sender.is_first_time(due):
            return np.empty(size, np.uint8)
        buffer = self._spare.pop() if self._spare else np.empty(_BUFFER_BYTES, np.uint8)
        self.give_back(sender)
        self._lent.append((due.seq, buffer))
        return buffer[:size]

    def give_back(self, sender: Sender) -> None:
        """Take back what has been acked."""
        if sender.num_rewinds != self._num_rewinds:
            self._num_rewinds = sender.num_rewinds
            self._lent.clear()
        while self._lent and self._lent[0][0] < sender.acked_seq:
            buffer = self._lent.popleft()[1]
            if len(self._spare) < SPARE_BUFFERS:
                self._spare.append(buffer)
        if sender.is_idle:
            self._spare.clear()


class BadMessage(NamedTuple):
    """A message that broke the protocol; it has been skipped."""

    text: str


def _cost(packed: PackedMessage) -> int:
    """Return the memory in bytes that a message takes until it is handed out."""
    return packed.num_bytes + READ_HEADER_SHARE * packed.header_bytes + MESSAGE_BYTES


class Conversation:
    """State of one session on one side."""

    def __init__(
        self,
        session: str,
        max_message_bytes: int,
        allowed: tuple[type, ...] = (),
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self.session = session
        self.tag = int(session[:8], 16)
        self.senders = (Sender(window_bytes), Sender(window_bytes))
        self.receivers = (Receiver(window_bytes), Receiver(window_bytes))
        self._buffers = (_Buffers(), _Buffers())
        self._assemblers = tuple(Reassembler(max_message_bytes, allowed) for _ in Lane)
        self._index_of_lane = [-1, -1]  # message being assembled
        self._next_in = 0
        self._next_out = 0
        self._waiting: dict[int, tuple[int, PackedMessage] | None] = {}
        self._waiting_bytes = 0
        self._largest_bytes = 0

    # -- out --

    def send(self, outgoing: OutgoingMessage) -> Lane:
        """Queue a message and return the lane it takes."""
        num_bytes = outgoing.total + len(outgoing.head) + MESSAGE_BYTES
        self._largest_bytes = max(self._largest_bytes, num_bytes)
        self.senders[outgoing.lane].queue(outgoing, self._next_out, num_bytes)
        self._next_out += 1
        return outgoing.lane

    @property
    def is_idle(self) -> bool:
        """Whether the peer has everything."""
        return self.senders[0].is_idle and self.senders[1].is_idle

    @property
    def queued_bytes(self) -> int:
        """What the peer has not got."""
        return self.senders[0].queued_bytes + self.senders[1].queued_bytes

    @property
    def is_overfull(self) -> bool:
        """Whether more waits for the peer than any honest one lets wait."""
        return self.queued_bytes > QUEUED_BYTES + QUEUED_LARGEST * self._largest_bytes

    @property
    def num_moved(self) -> int:
        """Packets that have arrived, and that the peer has confirmed, in order and once each."""
        arrived = sum(receiver.next_seq for receiver in self.receivers)
        return arrived + sum(sender.acked_seq for sender in self.senders)

    def frame(self, lane: int, due: PacketsDue) -> Any:
        """Return the packet *due* as one frame, its payload written once."""
        outgoing, number = due.cargo, due.number
        assert isinstance(outgoing, OutgoingMessage)
        size = outgoing.packet_bytes(number)
        if number:
            begin, kind, place = PREFIX_BYTES, Kind.CHUNK, outgoing.offset(number)
        else:
            begin, kind, place = PREFIX_BYTES + len(outgoing.head), Kind.FIRST, due.message
            if not outgoing.total:
                return packets.prefix(kind, lane, self.tag, due.seq, place, size) + outgoing.head
        out = self._buffers[lane].take(self.senders[lane], due, PREFIX_BYTES + size)
        view = out.data
        packets.write_prefix(view, kind, lane, self.tag, due.seq, place, size)
        if not number:
            view[PREFIX_BYTES:begin] = outgoing.head
        outgoing.write_chunk(number, out[begin:])
        return out

    # -- in --

    def set_limit(self, max_message_bytes: int) -> None:
        """Change the payload that a message may have, from the next header on."""
        for assembler in self._assemblers:
            assembler.max_message_bytes = max_message_bytes

    def is_due(self, packet: Packet) -> bool:
        """Return whether *packet* is the one its lane expects next."""
        return packet.tag == self.tag and packet.seq == self.receivers[packet.lane].next_seq

    def on_packet(self, packet: Packet) -> list[Envelope | BadMessage]:
        """Return the messages that can be handed out now, in order.

        Raises:
            RemoteProtocolError: The peer ignores the rules of the channel; end the session.
        """
        lane = packet.lane
        if packet.tag != self.tag:
            return []  # of an earlier session on the same connection
        if not self.receivers[lane].accept(packet.seq, len(packet.payload)):
            return []
        if packet.kind == Kind.FIRST:
            self._index_of_lane[lane] = self._check_index(packet.place)
        index = self._index_of_lane[lane]
        try:
            packed = self._assemblers[lane].add(packet)
        except RemoteProtocolError as error:
            self._put(index, None)
            return [BadMessage(str(error)), *self._release()]  # no reason to wait for its turn
        if packed is None:
            return []
        if index != self._next_in:
            self._put(index, (lane, packed))
            return []
        self._next_in += 1
        return [*self._unpack(lane, packed), *self._release()]

    def _check_index(self, index: int) -> int:
        if not self._next_in <= index < self._next_in + MAX_AHEAD or index in self._waiting:
            raise RemoteProtocolError(f"message {index} out of order, due is {self._next_in}")
        return index

    def _put(self, index: int, what: tuple[int, PackedMessage] | None) -> None:
        """Let a message wait for its turn, at a cost; None for a bad one."""
        if index < self._next_in or index in self._waiting:  # bad chunks after a bad message
            return
        self._waiting[index] = what
        if what is None:
            return
        lane, packed = what
        self.receivers[lane].hold(_cost(packed))
        self._waiting_bytes += _cost(packed)
        most = WAITING_WINDOWS * WINDOW_BYTES + 2 * self._assemblers[lane].max_message_bytes
        if self._waiting_bytes > most:
            raise RemoteProtocolError(
                f"{self._waiting_bytes} bytes wait for message {self._next_in}, at most {most}"
            )

    def _release(self) -> list[Envelope | BadMessage]:
        """Return the messages that have waited and whose turn it is."""
        released: list[Envelope | BadMessage] = []
        while self._next_in in self._waiting:
            what = self._waiting.pop(self._next_in)
            self._next_in += 1
            if what is not None:
                lane, packed = what
                self.receivers[lane].release(_cost(packed))
                self._waiting_bytes -= _cost(packed)
                released += self._unpack(lane, packed)
        return released

    def _unpack(self, lane: int, packed: PackedMessage) -> list[Envelope | BadMessage]:
        """Return a message whose turn it is."""
        try:
            envelope = self._assemblers[lane].unpack(packed, lane)
        except RemoteProtocolError as error:
            return [BadMessage(str(error))]
        self.receivers[lane].hold(envelope.num_bytes)
        return [envelope]

    def taken(self, lane: int, num_bytes: int) -> None:
        """Note that the application has a message of *num_bytes* now."""
        self.receivers[lane].release(num_bytes)

    # -- acks --

    def ack(self) -> Ack:
        """Return what has arrived, to be sent now."""
        control, bulk = self.receivers
        ack = Ack(
            control_next=control.next_seq,
            control_credit=control.credit,
            bulk_next=bulk.next_seq,
            bulk_credit=bulk.credit,
            gap=control.has_gap or bulk.has_gap,
        )
        control.acked()
        bulk.acked()
        return ack

    @property
    def owes_ack(self) -> bool:
        """Whether an ack would tell the peer something new."""
        return self.receivers[0].owes_ack or self.receivers[1].owes_ack

    @property
    def is_ack_due(self) -> bool:
        """Whether an ack must not wait."""
        return self.receivers[0].is_ack_due or self.receivers[1].is_ack_due

    def on_ack(self, ack: Ack, now_s: float) -> None:
        """Take note of what the peer has."""
        self.senders[0].on_ack(ack.control_next, ack.control_credit, now_s, gap=ack.gap)
        self.senders[1].on_ack(ack.bulk_next, ack.bulk_credit, now_s, gap=ack.gap)
        for sender, buffers in zip(self.senders, self._buffers, strict=True):
            buffers.give_back(sender)

    def on_attach(self, lane: int, ack: Ack, now_s: float) -> None:
        """Send again what the peer has not got: a new connection carries *lane*."""
        self.on_ack(ack, now_s)  # both lanes: this may be the only ack the other one gets
        self.senders[lane].rewind()
        self._buffers[lane].give_back(self.senders[lane])

    def ack_failed(self) -> None:
        """Owe the ack again that could not be sent."""
        for receiver in self.receivers:
            receiver.owe()
