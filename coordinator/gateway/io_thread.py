"""The I/O thread of the coordinator: one ROUTER socket, all sessions.

Not here: what the rest of the coordinator calls (`gateway.py`), delivery
(`edge_sdk/protocol/session.py`), keys (`keys`). Work per frame does not depend on the
number of devices: whatever is due later lies in a heap, whatever is due now in a small dict.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import zmq

from coordinator.gateway.doorkeeper import CHEAP, DEAR, Caller, Doorkeeper
from coordinator.gateway.inlet import Inlet
from coordinator.gateway.interface import Event, Joined, Left, Received, Rejected, Silent
from coordinator.gateway.keys.allow_list import AllowList, is_device_name
from coordinator.gateway.keys.zap import ZapHandler
from coordinator.gateway.outbox import Outbox
from coordinator.gateway.pace import Pace
from coordinator.gateway.sessions import (
    FAULT_COSTS,
    DeviceSession,
    EndedSessions,
    Rival,
    Schedule,
    SessionBudgets,
    is_session_id,
)
from edge_sdk.errors import RemoteProtocolError, public_text
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import FROM_DEVICE
from edge_sdk.protocol.packets import (
    Ack,
    Attach,
    Attached,
    Detach,
    Heartbeat,
    HeartbeatAck,
    Kind,
    Lane,
    Packet,
)
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.sockets import Waker

log = logging.getLogger(__name__)

# So many frames are read before acks and answers have their turn.
TURN_FRAMES = 64
TICK_S = 0.5
CHECK_S = 5.0
# A thread that comes so much too late to its tick has been stopped, or its process has.
STALL_S = 1.0
# A dropped device gets what was queued for it, within this time; a longer one if it spoke just now,
# as its link may have gone dead, which it notices only after some 20 s.
DROP_FLUSH_S = 5.0
LONG_FLUSH_S = 30.0
# A session with more bad messages than this is ended: answers to them cost memory.
MAX_BAD = 16
# Without a sign of life for two heartbeats a session gives way to another one with its key; one
# that speaks is asked, and has this long for an answer.
SILENT_S, ANSWER_S = 10.0, 8.0
_TAKEN_OVER = "another process with the same key has taken over while this one was silent"
_REVOKED = "this device's key is not registered any more"


@dataclass(slots=True)
class GatewayIo:
    """State of the I/O thread; `run` is its body."""

    inlet: Inlet
    out: Outbox
    door: Doorkeeper
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
    _routes: dict[bytes, DeviceSession] = field(default_factory=dict)
    _ended: EndedSessions = field(default_factory=EndedSessions)
    _contested: set[DeviceSession] = field(default_factory=set)
    _sessions_left: SessionBudgets = field(default_factory=SessionBudgets)
    _checks: Schedule = field(default_factory=Schedule)
    _tick_s: float = 0.0
    _pace: Pace = field(default_factory=Pace)
    _fresh: list[tuple[DeviceSession | None, Event]] = field(default_factory=list)
    _poller: zmq.Poller = field(default_factory=zmq.Poller)

    def post(self, *command: Any) -> None:
        """Hand a command to the thread, from any thread."""
        self.commands.append(command)
        self.waker.wake()

    def run(self) -> None:
        """Serve until closed; a failure of the thread itself reaches the reader of events."""
        try:
            for source in (self.waker.fileno(), self.out.router, self.door.monitor):
                self._poller.register(source, zmq.POLLIN)
            if self.zap is not None:
                self._poller.register(self.zap.socket, zmq.POLLIN)
            while not self.is_closing:
                self._turn()
            self.out.farewell()
        except Exception as error:  # noqa: BLE001 -- a thread that dies must not die unheard
            log.exception("gateway.failed")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.door.close()
            self.out.router.close()
            if self.zap is not None:
                self.zap.close()
            self.events.put([])

    def _turn(self) -> None:
        self._pace.wait(len(self.sessions))
        ready = dict(self._poller.poll(self._timeout_ms()))
        now_s = time.monotonic()
        if self.waker.fileno() in ready:
            self.waker.clear()
        while self.commands:
            self._command(self.commands.popleft(), now_s)
        if self.door.monitor in ready:
            self.door.news(now_s)
        if self.zap is not None and self.zap.socket in ready:
            self.zap.answer_all()
        if self.out.router in ready:
            self._drain(now_s)
        self._end_those_shut(now_s)
        self.out.pump(now_s)
        if now_s >= self._tick_s:
            self._tick(now_s)
        if self._fresh:  # one by one, each would wake the reader and wait for the interpreter
            self.events.put(self._fresh)
            self._fresh = []

    def _timeout_ms(self) -> int:
        until_s = 0.0 if self.commands else self.door.next_s(self.out.next_s(self._tick_s))
        return max(0, int((until_s - time.monotonic()) * 1000) + 1)

    def _command(self, command: tuple[Any, ...], now_s: float) -> None:
        name, session, *rest = command
        if session.is_over:
            return
        if name == "send":
            session.talk.send(rest[0])
            self.out.add(session)
            if session.talk.is_overfull:
                self._forget(session, f"{session.talk.queued_bytes} bytes wait for it")
        elif name == "taken":
            for lane, num_bytes in rest[0]:
                session.talk.taken(lane, num_bytes)
            self.out.owe(session, now_s)
        elif name == "limit":
            session.talk.set_limit(rest[0])
        elif name == "drop":
            is_here = now_s - session.heard_s < SILENT_S
            session.leave = (rest[0], now_s + (LONG_FLUSH_S if is_here else DROP_FLUSH_S))
            self._leave_if_due(session, now_s)
        elif name == "forget":
            self._forget(session, rest[0])

    # -- in --

    def _drain(self, now_s: float) -> None:
        for _ in range(TURN_FRAMES):
            try:
                caller = self.inlet.read(now_s)
            except zmq.Again:
                return
            if caller is None:
                continue
            session = self._routes.get(caller.route)
            if self.allowed is not None and not caller.name:
                self._revoked(caller, session, now_s)
                continue
            if session is not None and caller.name not in ("", session.name):
                session = None
            try:
                self._frame(caller, session, now_s)
            except RemoteProtocolError as error:
                self._bad_frame(caller, session, str(error), now_s)
            except (OSError, MemoryError, zmq.ZMQError):
                raise
            except Exception as error:
                log.exception("gateway.unforeseen name=%s", caller.name or "?")
                if session is not None:
                    self._forget(session, public_text(f"{type(error).__name__}: {error}"))

    def _frame(self, caller: Caller, session: DeviceSession | None, now_s: float) -> None:
        view = caller.frame.buffer
        packet = packets.read_packet(view)
        control = packets.read_control(packet) if packet.kind == Kind.CONTROL else None
        if session is None and not isinstance(control, Attach):
            if self.door.loose(caller.connection, now_s):
                self.out.say(caller.route, packets.AttachRequired())
            return
        if session is None or control is not None or not session.talk.is_due(packet):
            cost = CHEAP if control is None or isinstance(control, Ack) else DEAR
            if not self.door.affords(caller.connection, cost, now_s):
                return
        if isinstance(control, Attach):
            self._attach(caller, packet.lane, control, now_s)
        elif session is not None:
            session.bytes_up += len(view)
            session.heard(now_s)
            if control is None:
                self._on_data(session, packet, now_s)
            else:
                self._on_control(session, caller.route, packet.lane, control, now_s)

    def _on_data(self, session: DeviceSession, packet: Packet, now_s: float) -> None:
        talk = session.talk
        try:
            items = talk.on_packet(packet)
        except RemoteProtocolError as error:
            self._breach(session, str(error), now_s)
            return
        for item in items if session.leave is None else ():
            if isinstance(item, Envelope):
                self._fresh.append((session, Received(session.name, item)))
            else:
                self._bad_message(session, item.text, now_s)
        self.out.owe(session, now_s)

    def _on_control(
        self, session: DeviceSession, route: bytes, lane: int, control: Any, now_s: float
    ) -> None:
        if isinstance(control, Ack):
            try:
                session.talk.on_ack(control, now_s)
            except RemoteProtocolError as error:
                self._breach(session, str(error), now_s)
                return
            self.out.add(session)
            if session.leave is not None:
                self._leave_if_due(session, now_s)
        elif isinstance(control, Heartbeat):
            if lane == Lane.CONTROL:  # on bulk it may have waited behind megabytes
                session.take_numbers(control)
            self.out.say(route, HeartbeatAck(sent_s=control.sent_s), lane, session.talk.tag)
        elif isinstance(control, Detach) and control.session == session.id:
            self._expel(session, "")

    # -- sessions --

    def _attach(self, caller: Caller, lane: int, control: Attach, now_s: float) -> None:
        route, name = caller.route, caller.name
        if self.allowed is None:
            name = control.name
            caller = caller._replace(name=name)
        if not is_device_name(name) or not is_session_id(control.session):
            raise RemoteProtocolError(
                f"attach with name {name[:60]!r}, session {control.session!r}"
            )
        session = self.sessions.get(name)
        ended = self._ended.answer(control.session)
        if ended is not None:
            self.out.say(route, ended)
            return
        if session is None or session.id != control.session:
            if control.is_resumed:
                self.out.say(route, packets.UnknownSession(session=control.session))
                return
            if session is not None and not self._gives_way(session, caller, lane, control, now_s):
                return
            if not self._sessions_left.take(name, 1.0, now_s):
                self.door.shut(caller.connection, "too many sessions of its key", now_s)
                return
            session = self._open_session(caller, control.session, now_s)
        elif session.rival is not None:  # it was asked, and lives
            self._refuse_rival(session, session.rival, now_s)
        old = session.routes[lane]
        if old is not None:
            self._routes.pop(old, None)
            session.reconnects += old != route
        session.routes[lane] = route
        session.deaf_lanes.discard(lane)
        self._routes[route] = session
        session.heard(now_s)
        self.door.news(now_s)  # a new connection may have the descriptor of one that has ended
        before, session.connections[lane] = session.connections[lane], self.door.of(caller.frame)
        self.door.carry(before, -1, now_s)
        self.door.carry(session.connections[lane], 1, now_s)
        if before is None or before is not session.connections[lane]:
            session.talk.on_attach(lane, control.ack, now_s)
        else:
            session.talk.on_ack(control.ack, now_s)  # nothing was lost
        answer = Attached(session=control.session, name=name, ack=session.talk.ack())
        self.out.say(route, answer, lane, session.talk.tag)
        self.out.add(session)

    def _open_session(self, caller: Caller, session_id: str, now_s: float) -> DeviceSession:
        name = caller.name
        talk = Conversation(session_id, self.max_message_bytes, FROM_DEVICE)
        session = DeviceSession(name, caller.key, caller.address, talk, now_s, now_s)
        self.sessions[name] = session
        self._check_later(session, now_s)
        log.info("device.joined name=%s session=%s", name, session_id[:8])
        self._fresh.append((session, Joined(name, session_id)))
        return session

    # -- two sessions with one key --

    def _gives_way(
        self, older: DeviceSession, caller: Caller, lane: int, control: Attach, now_s: float
    ) -> bool:
        """End the session that has the name if it is certainly of no use; else ask it."""
        if older.key != caller.key:
            self._expel(older, _REVOKED)
        elif older.leave is not None:
            self._expel(older, older.leave[0])
        elif caller.route in older.routes or now_s - older.heard_s >= SILENT_S:
            self._expel(older, _TAKEN_OVER)
        if older.is_over:
            return True
        older.rival = older.rival or Rival(now_s + ANSWER_S)
        older.rival.attaches[lane] = (caller, control)
        self._contested.add(older)
        self._settle(older, now_s)
        return False

    def _settle(self, older: DeviceSession, now_s: float) -> None:
        """Give the name to the rival once the older session is known to be dead."""
        rival = older.rival
        if rival is None:  # it was refused
            self._contested.discard(older)
        elif older.is_over or now_s >= rival.until_s or not self.out.ask(older):
            self._contested.discard(older)
            older.rival = None
            self._expel(older, _TAKEN_OVER)
            for lane, (caller, control) in rival.attaches.items():
                self._attach(caller, lane, control, now_s)

    def _refuse_rival(self, session: DeviceSession, rival: Rival, now_s: float) -> None:
        session.rival = None
        reason = session.why_not_another(now_s)
        for caller, control in rival.attaches.values():
            self._ended.remember(control.session, reason)
            self.out.say(caller.route, packets.Closed(session=control.session, reason=reason))
        addresses = ",".join(sorted({caller.address for caller, _ in rival.attaches.values()}))
        self.door.trouble.tell("device.twin", session.name, f"address={addresses}", now_s)

    # -- the end of a session --

    def _expel(self, session: DeviceSession, reason: str) -> None:
        """End a session for good; whoever comes back with its id is told why, on either lane."""
        if session.is_over:
            return
        self._ended.remember(session.id, reason)
        if reason:  # without one it left by itself
            self.out.control(session, packets.Closed(session=session.id, reason=reason))
        self._over(session, reason)

    def _forget(self, session: DeviceSession, reason: str) -> None:
        """End a session so that the device, when it hears of that, begins another one."""
        if session.is_over:
            return
        self._ended.remember(session.id, None)
        self.out.control(session, packets.UnknownSession(session=session.id))
        self._over(session, reason)

    def _over(self, session: DeviceSession, reason: str) -> None:
        """Let go of a session."""
        session.is_over = True
        for route in session.routes:
            if route is not None:
                self._routes.pop(route, None)
        for connection in session.connections:
            self.door.carry(connection, -1, time.monotonic())
        self.out.forget(session)
        if self.sessions.get(session.name) is session:
            del self.sessions[session.name]
        log.info("device.left name=%s reason=%s", session.name, reason or "goodbye")
        self._fresh.append((session, Left(session.name, reason)))

    def _leave_if_due(self, session: DeviceSession, now_s: float) -> None:
        if session.leave is not None and (session.talk.is_idle or now_s >= session.leave[1]):
            self._expel(session, session.leave[0])

    # -- what is wrong --

    def _bad_frame(
        self, caller: Caller, session: DeviceSession | None, text: str, now_s: float
    ) -> None:
        if session is not None:
            self._bad_message(session, text, now_s)
            return
        if not self.door.loose(caller.connection, now_s):
            return
        text = public_text(text)
        self.out.say(caller.route, packets.Closed(session="", reason=text))
        if self.door.trouble.tell("gateway.frame_bad", caller.name, text, now_s) and caller.name:
            self._fresh.append((None, Rejected(caller.name, text)))

    def _bad_message(self, session: DeviceSession, text: str, now_s: float) -> None:
        if session.leave is not None:
            return
        text = public_text(text)
        is_told = self.door.trouble.tell("gateway.message_bad", session.name, text, now_s)
        if is_told or not session.num_bad:
            self._fresh.append((session, Rejected(session.name, text)))
        session.num_bad += 1
        if session.num_bad > MAX_BAD:
            self._breach(session, f"too many bad messages, the last: {text}", now_s)
            return
        session.talk.send(session.complaint(text))
        self.out.add(session)

    def _breach(self, session: DeviceSession, text: str, now_s: float) -> None:
        """End the session of whoever breaks the protocol, and let it wait for the next one."""
        if session.leave is not None:
            self._expel(session, session.leave[0])
            return
        text = public_text(text)
        self._sessions_left.take(session.name, FAULT_COSTS, now_s)
        self._fresh.append((session, Rejected(session.name, text)))
        self._expel(session, f"the protocol was broken: {text}")

    def _end_those_shut(self, now_s: float) -> None:
        self.door.look(now_s)
        while self.door.shut_now:
            connection, reason = self.door.shut_now.pop()
            for session in list(self.sessions.values()):
                if connection in session.connections:
                    self._breach(session, reason, now_s)

    def _revoked(self, caller: Caller, session: DeviceSession | None, now_s: float) -> None:
        if session is not None:
            self._expel(session, _REVOKED)
        elif self.door.loose(caller.connection, now_s):
            self.out.say(caller.route, packets.Closed(session="", reason=_REVOKED))

    # -- the clock --

    def _check_later(self, session: DeviceSession, now_s: float) -> None:
        at_s = now_s + min(CHECK_S, self.silent_after_s / 4, self.gone_after_s / 8)
        gone_s = session.heard_s + self.gone_after_s
        if now_s < gone_s:
            at_s = min(at_s, gone_s)
        self._checks.add(at_s, session)

    def _tick(self, now_s: float) -> None:
        late_s = now_s - self._tick_s if self._tick_s else 0.0
        if late_s > STALL_S:  # this process stood still: what it did not hear was not silence
            for session in self.sessions.values():
                session.excuse(late_s, now_s)
        self._tick_s = now_s + min(TICK_S, self.gone_after_s / 8)
        if self.allowed is not None and self.zap is not None and self.zap.has_news(now_s):
            for session in list(self.sessions.values()):
                if self.allowed.is_closed:
                    self._forget(session, "the allow-list cannot be read")
                elif self.allowed.name_of(session.key) != session.name:
                    self._expel(session, _REVOKED)
        self.door.tell(now_s)
        for session in list(self._contested):
            self._settle(session, now_s)
        for session in self._checks.due(now_s):
            self._check(session, now_s)

    def _check(self, session: DeviceSession, now_s: float) -> None:
        self.out.ack(session)
        if session.leave is not None:
            self._check_leaving(session, session.leave[0], now_s)
            return
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
            if sender.is_stuck(now_s):  # only the device can connect anew
                self.out.control(session, packets.AttachRequired(session=session.id))
        self._check_later(session, now_s)

    def _check_leaving(self, session: DeviceSession, reason: str, now_s: float) -> None:
        if not self.out.ask(session):  # nobody is there: its process has ended
            session.leave = (reason, now_s)
        self._leave_if_due(session, now_s)
        if not session.is_over:
            self._check_later(session, now_s)
