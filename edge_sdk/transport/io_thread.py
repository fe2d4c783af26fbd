"""The I/O thread of a device's link: two DEALER sockets, their monitors, and one conversation.

Not here: what applications call (`zmq_link.py`), and delivery itself (`protocol/session.py`).
Everything in this file runs in that one thread, except `post` and the plain reads of `stats`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import zmq

from edge_sdk.errors import EdgeError, PeerGone, RefusedError, RemoteProtocolError, SessionLost
from edge_sdk.protocol import packets
from edge_sdk.protocol.channel import ACK_EVERY_BYTES
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import FROM_COORDINATOR
from edge_sdk.protocol.packets import Kind, Lane
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.connection import REBUILD_FIRST_S, Counters, Line, Patience, drawn
from edge_sdk.transport.keys import KeyPair, fingerprint, make_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.pulse import Pulse
from edge_sdk.transport.sockets import Waker, receive_frame

log = logging.getLogger(__name__)

# Seconds that an ack may wait for others; well below any round trip that matters.
ACK_DELAY_S = 0.002
# One lane gets at most this many packets in a row before the other is looked at.
TURN_PACKETS = 64
ATTACH_RETRY_S = 2.0
TICK_S = 0.5
# After so long without a tick this process was stopped, or its machine slept.
STOOD_STILL_S = 5.0
# Both lines are built anew at the coordinator's request at most this often.
REBUILD_REQUEST_S = 10.0
# Nor while bytes of a chunk came or went so recently.
SLOW_S = 5.0
# What proves that nobody behind the address will ever take our handshake, whatever is tried.
NOT_OURS = (zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH,)


@dataclass(slots=True)
class DeviceIo:
    """State of the I/O thread; `run` is its body."""

    config: LinkConfig
    telemetry: Callable[[], dict[str, float]]
    sdk_version: str
    inbox: SimpleQueue[tuple[int, Envelope | EdgeError | None]] = field(default_factory=SimpleQueue)
    commands: deque[tuple[Any, ...]] = field(default_factory=deque)
    waker: Waker = field(default_factory=Waker)
    counters: Counters = field(default_factory=Counters)
    epoch: int = 0
    """Number of sessions lost so far; what was queued in an earlier one is dropped."""
    dead: EdgeError | None = None
    """Error after which the link will never work again."""
    name: str = ""
    has_error_posted: bool = False
    _context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    _lines: list[Line] = field(default_factory=list)
    _pulses: tuple[Pulse, Pulse] = field(init=False)
    _poller: zmq.Poller = field(default_factory=zmq.Poller)
    _talk: Conversation = field(init=False)
    _patience: Patience = field(init=False)
    _keys: KeyPair | None = None
    _is_resumed: bool = False
    _limit: int = 0
    _close_at_s: float | None = None
    _beat_s: float = 0.0
    _bulk_beats: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    _tick_s: float = 0.0
    _rebuilt_s: float = -REBUILD_REQUEST_S
    _must_rebuild: bool = False
    _moved_s: float = -REBUILD_REQUEST_S
    _ack_s: float | None = None
    _who_s: float = 0.0
    _taken_bytes: int = 0
    _has_more: bool = False

    def post(self, *command: Any) -> None:
        """Hand a command to the thread, from any thread."""
        self.commands.append(command)
        self.waker.wake()

    def took(self, epoch: int, envelope: Envelope) -> None:
        """Note that the application has *envelope*; wake the thread only if a window opens."""
        self.commands.append(("taken", epoch, envelope.lane, envelope.num_bytes))
        self._taken_bytes += envelope.num_bytes
        if self._taken_bytes >= ACK_EVERY_BYTES:
            self._taken_bytes = 0
            self.waker.wake()

    def run(self) -> None:
        """Move packets until closed; whatever goes wrong ends in `dead` and in the inbox."""
        try:
            self._open()
            while not self._is_done():
                self._turn()
            self._farewell()
        except EdgeError as error:
            self.dead = error
        except Exception as error:  # noqa: BLE001 -- a thread that dies must not die unheard
            log.exception("link.failed")
            self.dead = PeerGone(f"link to {self.config.address} failed: {error}")
            self.dead.__cause__ = error
        finally:
            self._shut()
            self.inbox.put((self.epoch, self.dead))

    # -- life --

    def _open(self) -> None:
        now_s = time.monotonic()
        if self.config.server_key:
            self._keys = self.config.keys or make_key_pair()
        self._poller.register(self.waker.fileno(), zmq.POLLIN)
        self._limit = self.config.max_message_bytes
        self._new_talk()
        for lane in Lane:
            self._lines.append(self._line(lane, REBUILD_FIRST_S))
        self._patience = Patience(self.config, now_s)
        self._pulses = (Pulse(self.config.lifeless_s), Pulse(self.config.lifeless_s))

    def _new_talk(self) -> None:
        self._talk = Conversation(secrets.token_hex(16), self._limit, FROM_COORDINATOR)
        self._is_resumed = False

    def _line(self, lane: Lane, pause_s: float) -> Line:
        return Line(self._context, self._poller, self.config, self._keys, lane, pause_s)

    def _rebuild(self, line: Line) -> None:
        self.counters.reconnects += line.is_attached
        self._pulses[line.lane].rest()
        line.close()
        self._lines[line.lane] = self._line(line.lane, line.next_pause_s())

    def _rebuild_all(self, reason: str, now_s: float) -> None:
        """Connect anew: one lane is dead, and whatever killed it may have killed the other one."""
        log.warning("link.stuck reason=%s", reason)
        self._rebuilt_s, self._must_rebuild = now_s, False
        for line in list(self._lines):
            self._rebuild(line)

    def _is_done(self) -> bool:
        if self.dead is not None or self._close_at_s is None:
            return self.dead is not None
        is_flushed = self._talk.is_idle and not self.commands
        return is_flushed or time.monotonic() >= self._close_at_s

    def _farewell(self) -> None:
        control = self._lines[Lane.CONTROL]
        if control.is_attached and self.dead is None:
            control.socket.linger = 300
            self._send_control(packets.Detach(session=self._talk.session))

    def _shut(self) -> None:
        for line in self._lines:
            line.close()
        self._context.term()

    # -- one turn --

    def _turn(self) -> None:
        ready = dict(self._poller.poll(self._timeout_ms()))
        now_s = time.monotonic()
        if self.waker.fileno() in ready:
            self.waker.clear()
        while self.commands:
            self._command(self.commands.popleft(), now_s)
        for line in self._lines:
            if line.monitor in ready:
                self._watch(line, now_s)
            state = ready.get(line.socket, 0)
            if state & zmq.POLLIN:
                self._drain(line, now_s)
            if state & zmq.POLLOUT:
                line.has_room()
        for line in self._lines:
            self._pump(line, now_s)
        self._ack_if_due(now_s)
        if self._must_rebuild:
            self._rebuild_all("the coordinator's word", now_s)
        if now_s >= self._tick_s:
            self._tick(now_s)

    def _timeout_ms(self) -> int:
        if self._has_more or self.commands:
            self._has_more = False
            return 0
        until_s = self._tick_s
        if self._ack_s is not None:
            until_s = min(until_s, self._ack_s)
        if self._close_at_s is not None:
            until_s = min(until_s, self._close_at_s)
        return max(0, int((until_s - time.monotonic()) * 1000) + 1)

    def _command(self, command: tuple[Any, ...], now_s: float) -> None:
        name, epoch, *rest = command
        if name == "close":
            self._close_at_s = now_s + rest[0]
        elif name == "limit":
            self._limit = rest[0]
            self._talk.set_limit(self._limit)
        elif epoch != self.epoch:
            return
        elif name == "send":
            self._talk.send(rest[0])
        elif name == "taken":
            self._talk.taken(*rest)

    def _pump(self, line: Line, now_s: float) -> None:
        sender = self._talk.senders[line.lane]
        for _ in range(TURN_PACKETS):
            due = sender.peek(now_s) if line.is_attached and not line.is_full else None
            if due is None:
                return
            frame = self._talk.frame(line.lane, due)
            if not line.put(frame):
                line.wait_for_room()
                return
            sender.sent(due)
            self.counters.bytes_up += len(frame)
        self._has_more = True

    # -- what arrives --

    def _drain(self, line: Line, now_s: float) -> None:
        for _ in range(TURN_PACKETS):
            try:
                frame = receive_frame(line.socket)
            except zmq.Again:
                return
            self._patience.heard_s = now_s
            if line.is_attached:
                self._pulses[line.lane].hear(now_s)
            else:
                self._pulses[line.lane].rest()
            if frame is None:
                continue
            view = frame.buffer
            self.counters.bytes_down += len(view)
            try:
                self._packet(line, packets.read_packet(view), now_s)
            except RemoteProtocolError as error:
                log.warning("link.packet_bad lane=%s error=%s", line.lane.name, error)
                self._report(error)

    def _packet(self, line: Line, packet: packets.Packet, now_s: float) -> None:
        if packet.kind == Kind.CONTROL:
            self._on_control(line, packets.read_control(packet), now_s)
            return
        for item in self._talk.on_packet(packet):
            news = item if isinstance(item, Envelope) else RemoteProtocolError(item.text)
            self.inbox.put((self.epoch, news))

    def _on_control(self, line: Line, control: Any, now_s: float) -> None:
        if isinstance(control, packets.Ack):
            self._acked(control, now_s)
        elif isinstance(control, packets.HeartbeatAck):
            if control.sent_s in self._bulk_beats:  # an older coordinator answers on control
                self._pulses[Lane.BULK].hear(now_s)
            else:
                self.counters.rtt_s = time.monotonic() - control.sent_s
        elif isinstance(control, packets.AttachRequired) and control.session:
            is_ours = control.session == self._talk.session
            is_slow = now_s - self._moved_s < SLOW_S
            if is_ours and not is_slow and now_s - self._rebuilt_s > REBUILD_REQUEST_S:
                self._must_rebuild = True
        elif isinstance(control, packets.AttachRequired):
            if now_s - self._who_s > TICK_S:  # one answer for a burst of packets
                self._who_s = now_s
                for each in self._lines:
                    self._attach(each, now_s)
        elif isinstance(control, packets.Closed) and not control.session:
            self._report(RefusedError(control.reason))
        elif (
            isinstance(control, (packets.Attached, packets.Closed, packets.UnknownSession))
            and control.session == self._talk.session
        ):
            if isinstance(control, packets.Attached):
                self._attached(line, control, now_s)
            elif isinstance(control, packets.UnknownSession):
                self._lost(now_s)
            else:
                self.dead = RefusedError(control.reason)

    def _acked(self, ack: packets.Ack, now_s: float) -> None:
        bulk = self._talk.senders[Lane.BULK]
        had = bulk.acked_seq
        self._talk.on_ack(ack, now_s)
        if bulk.acked_seq > had:  # all acks come on control, this one is of the other lane
            self._pulses[Lane.BULK].hear(now_s)

    def _attached(self, line: Line, control: packets.Attached, now_s: float) -> None:
        line.is_attached, line.is_full = True, False
        line.rebuild_pause_s = REBUILD_FIRST_S
        self.name = control.name
        self._is_resumed = True
        self._beat_s = now_s  # soon: does it carry more than a greeting?
        self._patience.attached(now_s)
        self._talk.on_attach(line.lane, control.ack, now_s)
        log.info("link.attached lane=%s name=%s", line.lane.name, control.name)

    def _lost(self, now_s: float) -> None:
        log.info("link.session_lost address=%s", self.config.address)
        self._new_talk()
        self.inbox.put((self.epoch, SessionLost("the coordinator does not know this session")))
        self.epoch += 1
        for line in self._lines:
            line.is_attached = False
            self._attach(line, now_s)

    # -- what we send unasked --

    def _send_control(self, control: Any) -> bool:
        return self._raw(
            self._lines[Lane.CONTROL], packets.control_frame(control, tag=self._talk.tag)
        )

    def _raw(self, line: Line, frame: bytes) -> bool:
        is_out = line.put(frame)
        self.counters.bytes_up += len(frame) * is_out
        return is_out

    def _attach(self, line: Line, now_s: float) -> None:
        line.attach_s = now_s
        if line.is_up:
            control = packets.Attach(
                session=self._talk.session,
                is_resumed=self._is_resumed,
                sdk_version=self.sdk_version,
                name=self.config.name,
                ack=self._talk.ack(),
            )
            if self._raw(line, packets.control_frame(control, line.lane, self._talk.tag)):
                self._pulses[line.lane].ask(now_s)
            else:
                self._talk.ack_failed()

    def _ack_if_due(self, now_s: float) -> None:
        if not self._lines[Lane.CONTROL].is_attached or not self._talk.owes_ack:
            self._ack_s = None
        elif self._talk.is_ack_due or (self._ack_s is not None and now_s >= self._ack_s):
            self._ack_s = None
            if not self._send_control(self._talk.ack()):
                self._talk.ack_failed()
        elif self._ack_s is None:
            self._ack_s = now_s + ACK_DELAY_S

    # -- monitors and clock --

    def _watch(self, line: Line, now_s: float) -> None:
        for event, value in line.news():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._attach(line, now_s)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refused(value)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value in NOT_OURS:
                self._not_ours()
            elif event == zmq.EVENT_CONNECT_RETRIED:
                line.rebuild_s = None
            elif event == zmq.EVENT_DISCONNECTED:
                self.counters.reconnects += line.is_attached
                line.is_attached = False
                self._pulses[line.lane].rest()
                # libzmq says at once if it will try this socket again. It will not after a refusal,
                # nor after bytes that are not ZeroMQ's, such as a proxy's page about an error.
                line.rebuild_s = now_s + drawn(line.rebuild_pause_s)

    def _not_ours(self) -> None:
        if not self._is_resumed:  # else it was ours, and something stands in its place for a while
            text = "speaks ZeroMQ without keys: another program, no coordinator of ours"
            self._report(RefusedError(f"{self.config.address} {text}"))

    def _refused(self, status: int) -> None:
        if status == 400 and self._keys is not None:
            text = f"the coordinator at {self.config.address} does not know this device's key"
            mine = f"{self._keys.public}, fingerprint {fingerprint(self._keys.public)}"
            self._report(RefusedError(f"{text}: register {mine}"))

    def _report(self, error: EdgeError) -> None:
        """Tell the application, unless an error that it was told before still waits for it."""
        if not self.has_error_posted:
            self.has_error_posted = True
            self.inbox.put((self.epoch, error))

    def _tick(self, now_s: float) -> None:
        if self._tick_s and now_s > self._tick_s + STOOD_STILL_S:
            self._excuse_all(now_s)
        self._tick_s = now_s + min(TICK_S, self.config.beat_s)
        self._look_at_bulk(now_s)
        for line in list(self._lines):
            if line.rebuild_s is not None and now_s >= line.rebuild_s:
                self._rebuild(line)
            elif line.is_up and not line.is_attached and now_s - line.attach_s > ATTACH_RETRY_S:
                self._attach(line, now_s)
            elif self._is_dead(line, now_s):
                self._rebuild_all(f"no answer on {line.lane.name}", now_s)  # and nobody was told
                break
        self._beat_if_due(now_s)
        error = self._patience.complaint(now_s, self._lines)
        if error is not None:
            self._report(error)

    def _look_at_bulk(self, now_s: float) -> None:
        """Wait on while a chunk is on its way, however long the link needs for it."""
        moved = self._lines[Lane.BULK].bytes.look()
        if moved.up:
            self._talk.senders[Lane.BULK].excuse(now_s)
        if moved.up or moved.down:
            self._moved_s = now_s
            self._pulses[Lane.BULK].rest()

    def _is_dead(self, line: Line, now_s: float) -> bool:
        is_stuck = line.is_attached and self._talk.senders[line.lane].is_stuck(now_s)
        return self._pulses[line.lane].is_gone(now_s) or is_stuck

    def _excuse_all(self, now_s: float) -> None:
        """Blame nobody for a silence in which we did not listen."""
        for pulse, sender in zip(self._pulses, self._talk.senders, strict=True):
            pulse.rest()
            sender.excuse(now_s)

    def _beat_if_due(self, now_s: float) -> None:
        if now_s < self._beat_s or not self._lines[Lane.CONTROL].is_attached:
            return
        self._beat_s = now_s + self.config.beat_s
        rtt_s, numbers = self.counters.rtt_s or 0.0, self.telemetry()
        for line in self._lines:  # bulk as well: both must be known to be alive
            if line.is_attached:
                sent_s = time.monotonic()
                beat = packets.Heartbeat(sent_s=sent_s, rtt_s=rtt_s, numbers=numbers)
                if line.lane == Lane.BULK:  # what the board says is read on control alone
                    self._bulk_beats.append(sent_s)
                    beat = packets.Heartbeat(sent_s=sent_s, rtt_s=rtt_s, numbers={})
                if self._raw(line, packets.control_frame(beat, line.lane, self._talk.tag)):
                    self._pulses[line.lane].ask(now_s)
