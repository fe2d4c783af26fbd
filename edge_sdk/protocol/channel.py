"""One lane between two sides: everything arrives once and in order, whatever the connection does.

Pure: no socket, no thread, and the clock is an argument. Not here: what the packets carry
(`fragments.py`), nor how two lanes become one stream of messages (`session.py`).

Rule 1: packets are numbered; the receiver takes only the one it expects next (go-back-N).
Rule 2: an ack is cumulative; "next" says that everything before has arrived.
Rule 3: credit counts payload bytes from the start of the session and never shrinks; the receiver
        grants what has arrived plus a window, less what the application has left lying beyond
        another window (so that a reader that is a little late does not stop the sender).
Rule 4: after a reconnect or a gap send again from the last ack; after a long time without progress
        reconnect.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.packets import MAX_CHUNK_BYTES

# Enough for 640 Mbit/s at 50 ms. Small, because both ends may hold this much per lane and device,
# and because it is also faster on one machine (measured): the frames stay in the cache.
WINDOW_BYTES = 4 * 1024 * 1024
# Packets in flight stay below the 128 that libzmq queues per connection, so its limit never bites.
MAX_PACKETS_IN_FLIGHT = 96
# TCP loses nothing, a reconnect is seen: only a connection that died unseen waits this long.
RESEND_AFTER_S = 30.0
# A link whose acks come slowly, as it is slow for its chunks, is given so many times the slowest.
RESEND_MARGIN = 2.0
MOST_RESEND_AFTER_S = 120.0
# Acks may wait until this much has come, or until the receiver has nothing else to do.
ACK_EVERY_PACKETS = 16
ACK_EVERY_BYTES = WINDOW_BYTES // 4


class Cargo(Protocol):
    """What a sender needs to know of a message."""

    @property
    def num_packets(self) -> int:
        """Packets the message is cut into."""

    def packet_bytes(self, number: int) -> int:
        """Return the payload of packet *number*."""


class PacketsDue(NamedTuple):
    """A packet that may be sent now."""

    seq: int
    cargo: Cargo
    number: int
    """Number of the packet within its message, from 0."""
    message: int
    """Number of the message within its session."""
    size: int
    """Payload in bytes."""


class _Queued(NamedTuple):
    first_seq: int
    cargo: Cargo
    message: int
    num_bytes: int


class Sender:
    """Outgoing half of a lane."""

    def __init__(
        self,
        window_bytes: int = WINDOW_BYTES,
        max_packets: int = MAX_PACKETS_IN_FLIGHT,
        resend_after_s: float = RESEND_AFTER_S,
    ) -> None:
        self._window_bytes = window_bytes
        self._max_packets = max_packets
        self._resend_after_s = self._limit_s = resend_after_s
        self._queue: deque[_Queued] = deque()  # not yet acked, oldest first
        self._at = 0  # place in the queue of the message that is being sent
        self._end_seq = 0  # number the next queued message starts with
        self._next_seq = 0  # to be sent next
        self._acked_seq = 0  # expected by the peer
        self._sizes: deque[int] = deque()  # of the packets in flight
        self._sent_bytes = 0  # since the start of the session, up to _next_seq
        self._acked_bytes = 0
        self._credit = window_bytes
        self._high_seq = 0  # first number that was never sent
        self._progress_s = 0.0
        self._rewound_seq = -1
        self.queued_bytes = 0
        """What the peer has not got, as far as `queue` was told."""
        self.num_resent = 0
        self.num_rewinds = 0

    @property
    def acked_seq(self) -> int:
        """Number of the packet the peer expects next."""
        return self._acked_seq

    def is_first_time(self, due: PacketsDue) -> bool:
        """Return whether *due* was never sent before."""
        return due.seq >= self._high_seq

    @property
    def is_idle(self) -> bool:
        """Whether everything queued has arrived."""
        return not self._queue

    def queue(self, cargo: Cargo, message: int, num_bytes: int = 0) -> None:
        """Put message number *message* of the session, which holds *num_bytes*, at the end."""
        self._queue.append(_Queued(self._end_seq, cargo, message, num_bytes))
        self.queued_bytes += num_bytes
        self._end_seq += cargo.num_packets

    def peek(self, now_s: float) -> PacketsDue | None:
        """Return the next packet to send, or None if nothing may be sent now."""
        if self._next_seq >= self._end_seq or len(self._sizes) >= self._max_packets:
            return None
        item = self._queue[self._at]
        number = self._next_seq - item.first_seq
        size = item.cargo.packet_bytes(number)
        after = self._sent_bytes + size
        if after > self._credit or after - self._acked_bytes > self._window_bytes:
            return None
        if not self._sizes:
            self._progress_s = now_s  # the clock of rule 4 starts with the first packet out
        return PacketsDue(self._next_seq, item.cargo, number, item.message, size)

    def sent(self, due: PacketsDue) -> None:
        """Note that *due*, from `peek`, has been handed to the connection."""
        self._sizes.append(due.size)
        self._sent_bytes += due.size
        self._next_seq += 1
        if self._next_seq > self._high_seq:
            self._high_seq = self._next_seq
        else:
            self.num_resent += 1
        if due.number + 1 == due.cargo.num_packets:
            self._at += 1

    def on_ack(self, next_seq: int, credit: int, now_s: float, *, gap: bool = False) -> None:
        """Take note of what the peer has, and of what it allows.

        Raises:
            RemoteProtocolError: It claims to have what was never sent.
        """
        if next_seq > self._high_seq:
            raise RemoteProtocolError(f"ack of packet {next_seq - 1}, sent {self._high_seq}")
        self._credit = max(self._credit, credit)
        if next_seq > self._acked_seq:
            slow_s = max(self._limit_s / 2, RESEND_MARGIN * (now_s - self._progress_s))
            self._limit_s = min(MOST_RESEND_AFTER_S, max(self._resend_after_s, slow_s))
            self._progress_s = now_s
            self._advance(next_seq)
        elif gap and next_seq == self._acked_seq and self._rewound_seq != next_seq:
            self.rewind()

    def _advance(self, next_seq: int) -> None:
        if next_seq > self._next_seq:  # a late ack overtook a rewind
            while self._next_seq < next_seq:
                item = self._queue[self._at]
                size = item.cargo.packet_bytes(self._next_seq - item.first_seq)
                self._sizes.append(size)
                self._sent_bytes += size
                self._next_seq += 1
                if self._next_seq == item.first_seq + item.cargo.num_packets:
                    self._at += 1
        for _ in range(next_seq - self._acked_seq):
            self._acked_bytes += self._sizes.popleft()
        self._acked_seq = next_seq
        while self._queue:
            item = self._queue[0]
            if item.first_seq + item.cargo.num_packets > next_seq:
                break
            self._queue.popleft()
            self.queued_bytes -= item.num_bytes
            self._at -= 1

    def is_stuck(self, now_s: float) -> bool:
        """Return whether no ack has moved for too long with packets in flight: connect anew then.

        Whoever is stuck again waits twice as long: a chunk may need more time than we thought.
        """
        if not self._sizes or now_s - self._progress_s < self._limit_s:
            return False
        self._limit_s = min(MOST_RESEND_AFTER_S, 2 * self._limit_s)
        self._progress_s = now_s
        return True

    def excuse(self, now_s: float) -> None:
        """Let the wait for an ack begin anew: our own clock stood still, and nobody is to blame."""
        self._progress_s = now_s

    def rewind(self) -> None:
        """Send again from the last ack: what was under way is lost with its connection."""
        self.num_rewinds += 1
        self._rewound_seq = self._acked_seq
        self._next_seq = self._acked_seq
        self._sent_bytes = self._acked_bytes
        self._sizes.clear()
        self._at = 0  # acked messages have left the queue: the first one is not complete


class Receiver:
    """Incoming half of a lane."""

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self._window_bytes = window_bytes
        self._received_bytes = 0
        self._held_bytes = 0
        self._granted = window_bytes
        self._unacked_packets = 0
        self._unacked_bytes = 0
        self._acked_credit = window_bytes
        self._has_opened = False
        self.next_seq = 0
        self.has_gap = False

    def accept(self, seq: int, size: int) -> bool:
        """Return whether packet *seq* is the expected one; others are dropped.

        Raises:
            RemoteProtocolError: The peer sent more than it was allowed to.
        """
        self._unacked_packets += 1
        if seq != self.next_seq:
            self.has_gap = self.has_gap or seq > self.next_seq
            return False
        if self._received_bytes + size > self._granted:
            raise RemoteProtocolError(
                f"{self._received_bytes + size} bytes sent, allowed were {self._granted}"
            )
        self.next_seq += 1
        self.has_gap = False
        self._received_bytes += size
        self._unacked_bytes += size
        return True

    def hold(self, num_bytes: int) -> None:
        """Count a complete message that waits for the application against the window."""
        self._held_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Note that the application has taken a message."""
        self._held_bytes -= num_bytes
        self._has_opened = self.credit - self._acked_credit >= ACK_EVERY_BYTES

    @property
    def credit(self) -> int:
        """Bytes the peer may send, counted from the start of the session."""
        excess = max(0, self._held_bytes - self._window_bytes)
        fresh = self._received_bytes - excess + self._window_bytes
        self._granted = max(self._granted, fresh)
        return self._granted

    @property
    def owes_ack(self) -> bool:
        """Whether anything has changed since the last ack."""
        return self._unacked_packets > 0 or self._has_opened

    @property
    def is_ack_due(self) -> bool:
        """Whether the ack must not wait any longer."""
        # Arrivals let the credit grow with _unacked_bytes; what `release` adds is in _has_opened.
        return (
            self._unacked_packets >= ACK_EVERY_PACKETS
            or self._unacked_bytes >= ACK_EVERY_BYTES
            or self.has_gap
            or self._has_opened
        )

    def owe(self) -> None:
        """Owe an ack again: the peer has not got the one that `acked` has noted."""
        self._unacked_packets += 1

    def acked(self) -> None:
        """Note that an ack has been sent."""
        self._unacked_packets = self._unacked_bytes = 0
        self._acked_credit = self.credit
        self.has_gap = self._has_opened = False


assert WINDOW_BYTES >= 2 * MAX_CHUNK_BYTES
