"""The I/O thread of the coordinator: one ROUTER socket, all sessions.

Not here: what the rest of the coordinator calls (`gateway.py`), delivery
(`edge_sdk/protocol/session.py`), keys (`allow_list.py`). Work per frame does not depend on the
number of devices: whatever is due later lies in a heap, whatever is due now in a small dict.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import zmq

from coordinator.gateway.allow_list import AllowList, ZapHandler, is_device_name
from coordinator.gateway.interface import Event, Joined, Left, Received, Rejected, Silent
from coordinator.gateway.outbox import Outbox
from coordinator.gateway.sessions import DeviceSession, is_session_id
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import Envelope, OutgoingMessage
from edge_sdk.protocol.messages import FROM_DEVICE, Failure, Stamp
from edge_sdk.protocol.packets import (
    Ack,
    Attach,
    Attached,
    Detach,
    Heartbeat,
    HeartbeatAck,
    Kind,
    Packet,
)
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.sockets import Waker, receive_frame

log = logging.getLogger(__name__)

# So many frames are read before acks and answers have their turn.
TURN_FRAMES = 64
TICK_S = 0.5
CHECK_S = 5.0
# A thread that comes so much too late to its tick has been stopped, or its process has.
STALL_S = 1.0
# A dropped device gets what was queued for it, within this time.
DROP_FLUSH_S = 5.0
# A session with more bad messages than this is ended: answers to them cost memory.
MAX_BAD = 16
# So many ended sessions are remembered: a late packet of one must not replace its successor.
MAX_EXPELLED = 4096
_TAKEN_OVER = "another process with the same key has taken over"
_REVOKED = "this device's key is not registered any more"


@dataclass(slots=True)
class GatewayIo:
    """State of the I/O thread; `run` is its body."""

    out: Outbox
    zap: ZapHandler | None
    allowed: AllowList | None
    max_message_bytes: int
    silent_after_s: float
    gone_after_s: float
    events: SimpleQueue[list[tuple[DeviceSession | None, Event]]] = field(
        default_factory=SimpleQueue
    )
    """Batches of events; an empty one only wakes the reader."""
    commands: deque[tuple[Any, ...]] = field(default_factory=deque)
    waker: Waker = field(default_factory=Waker)
    sessions: dict[str, DeviceSession] = field(default_factory=dict)
    is_closing: bool = False
    failure: str = ""
    _routes: dict[bytes, tuple[DeviceSession, int]] = field(default_factory=dict)
    _expelled: OrderedDict[str, str] = field(default_factory=OrderedDict)
    _checks: list[tuple[float, int, DeviceSession]] = field(default_factory=list)
    _num_checks: int = 0
    _tick_s: float = 0.0
    _fresh: list[tuple[DeviceSession | None, Event]] = field(default_factory=list)
    _poller: zmq.Poller = field(default_factory=zmq.Poller)

    def post(self, *command: Any) -> None:
        """Hand a command to the thread, from any thread."""
        self.commands.append(command)
        self.waker.wake()

    def run(self) -> None:
        """Serve until closed; a failure of the thread itself reaches the reader of events."""
        try:
            self._poller.register(self.waker.fileno(), zmq.POLLIN)
            self._poller.register(self.out.router, zmq.POLLIN)
            if self.zap is not None:
                self._poller.register(self.zap.socket, zmq.POLLIN)
            while not self.is_closing:
                self._turn()
            self.out.farewell()
        except Exception as error:  # noqa: BLE001 -- a thread that dies must not die unheard
            log.exception("gateway.failed")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.out.router.close()
            if self.zap is not None:
                self.zap.close()
            self.events.put([])

    def _turn(self) -> None:
        ready = dict(self._poller.poll(self._timeout_ms()))
        now_s = time.monotonic()
        if self.waker.fileno() in ready:
            self.waker.clear()
        while self.commands:
            self._command(self.commands.popleft(), now_s)
        if self.zap is not None and self.zap.socket in ready:
            self.zap.answer_all()
        if self.out.router in ready:
            self._drain(now_s)
        self.out.pump(now_s)
        if now_s >= self._tick_s:
            self._tick(now_s)
        if self._fresh:  # one by one, each would wake the reader and wait for the interpreter
            self.events.put(self._fresh)
            self._fresh = []

    def _timeout_ms(self) -> int:
        until_s = 0.0 if self.commands else self.out.next_s(self._tick_s)
        return max(0, int((until_s - time.monotonic()) * 1000) + 1)

    def _command(self, command: tuple[Any, ...], now_s: float) -> None:
        name, session, *rest = command
        if session.is_over:
            return
        if name == "send":
            session.talk.send(rest[0])
            self.out.add(session)
        elif name == "taken":
            for lane, num_bytes in rest[0]:
                session.talk.taken(lane, num_bytes)
            self.out.owe(session, now_s)
        elif name == "limit":
            session.talk.set_limit(rest[0])
        elif name == "drop":
            session.leave = (rest[0], now_s + DROP_FLUSH_S)
            self._leave_if_due(session, now_s)
        elif name == "forget":
            self._forget(session, rest[0])

    # -- in --

    def _drain(self, now_s: float) -> None:
        router = self.out.router
        for _ in range(TURN_FRAMES):
            try:
                route = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            frame = receive_frame(router)
            if frame is None:
                continue
            known = self._routes.get(route)
            name = self._name(frame) if self.allowed is not None else known and known[0].name
            if self.allowed is not None and name is None:
                self._revoked(route, known)
                continue
            session = known[0] if known is not None and known[0].name == name else None
            try:
                self._frame(route, name or "", session, frame.buffer, now_s)
            except RemoteProtocolError as error:
                self._bad_frame(route, name or "", session, str(error))

    def _name(self, frame: zmq.Frame) -> str | None:
        assert self.allowed is not None
        try:
            return self.allowed.name_of(str(frame.get("User-Id")))
        except zmq.ZMQError:
            return None

    def _frame(
        self, route: bytes, name: str, session: DeviceSession | None, view: memoryview, now_s: float
    ) -> None:
        packet = packets.read_packet(view)
        if packet.kind == Kind.CONTROL:
            control = packets.read_control(packet)
            if isinstance(control, Attach):
                self._attach(route, packet.lane, name, control, now_s)
            elif session is None:
                self.out.say(route, packets.AttachRequired())
            else:
                session.bytes_up += len(view)
                self._heard(session, now_s)
                self._on_control(session, control, now_s)
        elif session is None:
            self.out.say(route, packets.AttachRequired())
        else:
            session.bytes_up += len(view)
            self._heard(session, now_s)
            self._on_data(session, packet, now_s)

    def _on_data(self, session: DeviceSession, packet: Packet, now_s: float) -> None:
        talk = session.talk
        try:
            items = talk.on_packet(packet)
        except RemoteProtocolError as error:
            self._fresh.append((session, Rejected(session.name, str(error))))
            self._expel(session, f"the protocol was broken: {error}")
            return
        for item in items:
            if isinstance(item, Envelope):
                self._fresh.append((session, Received(session.name, item)))
            else:
                self._bad_message(session, item.text)
        self.out.owe(session, now_s)

    def _on_control(self, session: DeviceSession, control: Any, now_s: float) -> None:
        if isinstance(control, Ack):
            try:
                session.talk.on_ack(control, now_s)
            except RemoteProtocolError as error:
                self._fresh.append((session, Rejected(session.name, str(error))))
                self._expel(session, f"the protocol was broken: {error}")
                return
            self.out.add(session)
            if session.leave is not None:
                self._leave_if_due(session, now_s)
        elif isinstance(control, Heartbeat):
            session.telemetry = control.numbers
            session.rtt_s = control.rtt_s or None
            self.out.control(session, HeartbeatAck(sent_s=control.sent_s))
        elif isinstance(control, Detach) and control.session == session.id:
            self._expel(session, "")

    def _heard(self, session: DeviceSession, now_s: float) -> None:
        session.heard_s = now_s
        session.silent_s = 0.0

    # -- sessions --

    def _attach(self, route: bytes, lane: int, name: str, control: Attach, now_s: float) -> None:
        if self.allowed is None:
            name = control.name
        if not is_device_name(name) or not is_session_id(control.session):
            raise RemoteProtocolError(
                f"attach with name {name[:60]!r}, session {control.session!r}"
            )
        session = self.sessions.get(name)
        reason = self._expelled.get(control.session)
        if reason is not None:
            self.out.say(route, packets.Closed(session=control.session, reason=reason))
            return
        if session is None or session.id != control.session:
            if control.is_resumed:
                self.out.say(route, packets.UnknownSession(session=control.session))
                return
            session = self._open_session(name, control.session, now_s)
        old = session.routes[lane]
        if old is not None:
            self._routes.pop(old, None)
            session.reconnects += old != route
        session.routes[lane] = route
        self._routes[route] = (session, lane)
        self._heard(session, now_s)
        session.talk.on_attach(lane, control.ack, now_s)
        answer = Attached(session=control.session, name=name, ack=session.talk.ack())
        self.out.say(route, answer, lane, session.talk.tag)
        self.out.add(session)

    def _open_session(self, name: str, session_id: str, now_s: float) -> DeviceSession:
        older = self.sessions.get(name)
        if older is not None:
            self._expel(older, _TAKEN_OVER)
        session = DeviceSession(
            name, Conversation(session_id, self.max_message_bytes, FROM_DEVICE), now_s
        )
        self.sessions[name] = session
        self._check_later(session, now_s)
        log.info("device.joined name=%s session=%s", name, session_id[:8])
        self._fresh.append((session, Joined(name, session_id)))
        return session

    def _expel(self, session: DeviceSession, reason: str) -> None:
        """End a session for good; whoever comes back with its id is told why, on either lane."""
        if session.is_over:
            return
        self._expelled[session.id] = reason
        if len(self._expelled) > MAX_EXPELLED:
            self._expelled.popitem(last=False)
        if reason:  # without one it left by itself
            self.out.control(session, packets.Closed(session=session.id, reason=reason))
        self._over(session, reason)

    def _forget(self, session: DeviceSession, reason: str) -> None:
        """End a session so that the device, when it hears of that, begins another one."""
        self.out.control(session, packets.UnknownSession(session=session.id))
        self._over(session, reason)

    def _over(self, session: DeviceSession, reason: str) -> None:
        """Let go of a session."""
        session.is_over = True
        for route in session.routes:
            if route is not None:
                self._routes.pop(route, None)
        self.out.forget(session)
        if self.sessions.get(session.name) is session:
            del self.sessions[session.name]
        log.info("device.left name=%s reason=%s", session.name, reason or "goodbye")
        self._fresh.append((session, Left(session.name, reason)))

    def _leave_if_due(self, session: DeviceSession, now_s: float) -> None:
        if session.leave is not None and (session.talk.is_idle or now_s >= session.leave[1]):
            self._expel(session, session.leave[0])

    # -- what is wrong --

    def _bad_frame(self, route: bytes, name: str, session: DeviceSession | None, text: str) -> None:
        if session is not None:
            self._bad_message(session, text)
            return
        log.warning("gateway.frame_bad name=%s error=%s", name or "?", text)
        self.out.say(route, packets.Closed(session="", reason=text))
        if name:
            self._fresh.append((None, Rejected(name, text)))

    def _bad_message(self, session: DeviceSession, text: str) -> None:
        log.warning("gateway.message_bad name=%s error=%s", session.name, text)
        self._fresh.append((session, Rejected(session.name, text)))
        session.num_bad += 1
        if session.num_bad > MAX_BAD:
            self._expel(session, f"too many bad messages, the last: {text}")
            return
        stamp, error = Stamp(device=session.name), RemoteProtocolError.__name__
        failure = Failure(stamp=stamp, error=error, text=text[:1000])
        session.talk.send(OutgoingMessage(failure, {}))
        self.out.add(session)

    def _revoked(self, route: bytes, known: tuple[DeviceSession, int] | None) -> None:
        if known is not None:
            self._expel(known[0], _REVOKED)
        else:
            self.out.say(route, packets.Closed(session="", reason=_REVOKED))

    # -- the clock --

    def _check_later(self, session: DeviceSession, now_s: float) -> None:
        self._num_checks += 1  # breaks ties, sessions have no order
        at_s = now_s + min(CHECK_S, self.silent_after_s / 4, self.gone_after_s / 8)
        gone_s = session.heard_s + self.gone_after_s
        if now_s < gone_s:
            at_s = min(at_s, gone_s)
        heapq.heappush(self._checks, (at_s, self._num_checks, session))

    def _tick(self, now_s: float) -> None:
        late_s = now_s - self._tick_s if self._tick_s else 0.0
        if late_s > STALL_S:  # this process stood still: what it did not hear was not silence
            for session in self.sessions.values():
                session.heard_s = min(now_s, session.heard_s + late_s)
        self._tick_s = now_s + min(TICK_S, self.gone_after_s / 8)
        if self.allowed is not None and self.allowed.reload_if_changed():
            for name in self.sessions.keys() - self.allowed.devices().keys():
                self._expel(self.sessions[name], _REVOKED)
        while self._checks and self._checks[0][0] <= now_s:
            session = heapq.heappop(self._checks)[2]
            if not session.is_over:
                self._check(session, now_s)

    def _check(self, session: DeviceSession, now_s: float) -> None:
        self._leave_if_due(session, now_s)
        self.out.ack(session)
        silent_s = now_s - session.heard_s
        if silent_s >= self.gone_after_s:
            self._forget(session, f"silent for {silent_s:.0f} s")
            return
        if silent_s >= self.gone_after_s / 2:
            self.out.control(session, packets.AttachRequired())
        if silent_s >= max(self.silent_after_s, 2 * session.silent_s):
            session.silent_s = silent_s
            self._fresh.append((session, Silent(session.name, silent_s)))
        for sender in session.talk.senders:
            if sender.is_stuck(now_s):
                self.out.add(session)
        if not session.is_over:
            self._check_later(session, now_s)
