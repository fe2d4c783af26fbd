"""A coordinator and its devices in one process, on a network and a clock that a test moves.

Both sides are those of a deployment; what lies between them is not: a session is two queues, and
nothing travels, computes or takes time before the test says so. Each device has a thread, but only
one thread runs at any time, so that equal scripts do the same things in the same order.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any

from coordinator.gateway.interface import DeviceStats, Event, Joined, Left, Received, Silent
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.client import EdgeClient
from edge_sdk.client.config import ClientConfig
from edge_sdk.client.participant import STOPPED
from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError, PeerGone, ReceiveTimeout, RefusedError, SessionLost
from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import Message, RoundStart, StepReport
from edge_sdk.transport.link import FLUSH_S, NO_TENSORS, LinkStats
from edge_sdk.transport.memory_link import memory_pair

FIRST_LIMIT_BYTES = 1024 * 1024
# Seconds that the gateway gives a device that is to leave, as the real one does.
LEAVE_S = 30.0


class Killed(BaseException):
    """The process of a device ends here and now."""


class Crashed(BaseException):
    """The process of the coordinator ends here and now."""


class Clock:
    """A monotonic clock that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


class HeldCompute(Executor):
    """Computes when the test says so; until then other things may happen."""

    def __init__(self) -> None:
        self._held: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep *fn* for later."""
        future: Future[Any] = Future()
        self._held.append((future, lambda: fn(*args, **kwargs)))
        return future

    @property
    def is_due(self) -> bool:
        """Whether something waits to be computed."""
        return bool(self._held)

    def finish(self) -> None:
        """Compute what has waited longest."""
        future, compute = self._held.popleft()
        try:
            future.set_result(compute())
        except Exception as error:  # noqa: BLE001 - handed on
            future.set_exception(error)


class Session:
    """A session of one device: what is on its way up and down."""

    def __init__(self) -> None:
        self.ours, self.theirs = memory_pair()
        self.theirs.set_limit(FIRST_LIMIT_BYTES)
        self.up = self.down = 0
        """Messages on their way."""
        self.is_attached = False
        """Whether a coordinator has ever known it."""
        self.is_closing = False
        """Whether the device ends it when all is sent."""
        self.leave: tuple[str, float] | None = None
        """Why the coordinator ends it, and when at the latest."""
        self.heard_s = self.told_s = 0.0
        self.num_moved = 0
        """Messages that have arrived."""


class ScheduledLink:
    """A device's link: it waits until the scheduler gives it something."""

    def __init__(self, device: ScheduledDevice) -> None:
        self._device = device
        self._session = device.session
        """The session that the application knows of."""
        self.news: deque[BaseException] = deque()
        self.granted = 0
        """Messages that have arrived."""
        self.is_killed = False
        self.dies_in = 0
        """Messages of its own after which the process ends; 0: never."""

    def send(self, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Put a message on its way; into a lost session nothing is sent."""
        if self.dies_in:
            self.dies_in -= 1
            self.is_killed = not self.dies_in
        if self.is_killed:
            raise Killed
        self._session.ours.send(message, tensors)
        self._session.up += 1

    def receive(self, deadline: Deadline) -> Envelope:
        """Return what has arrived, or let the others go on first."""
        if not self._has_news() and deadline.left_s():
            self._device.pause()
        if self.is_killed:
            raise Killed
        if self.granted:
            self.granted -= 1
            return self._session.ours.receive(Deadline.after(0.0))
        if not self.news:
            raise ReceiveTimeout("nothing arrived in time")
        news = self.news.popleft()
        if isinstance(news, SessionLost):
            self._session = self._device.session
        raise news

    def _has_news(self) -> bool:
        return bool(self.is_killed or self.granted or self.news)

    def set_limit(self, max_message_bytes: int) -> None:
        """Change the payload that one received message may have."""
        self._session.ours.set_limit(max_message_bytes)

    def stats(self) -> LinkStats:
        """Return what the link has done so far."""
        return self._session.ours.stats()

    def close(self, flush_s: float = FLUSH_S) -> None:
        """End the session in order, if this process still can."""
        if not self.is_killed:
            self._session.is_closing = True


class ScheduledDevice(Callback):
    """A device: a process that may be killed and started again, and its state on disk."""

    def __init__(self, name: str, config: ClientConfig, rows: list[dict[str, Any]]) -> None:
        self.name, self._config, self._rows = name, config, rows
        self.error: BaseException | None = None
        """What a process of it has ended with, where that was not to be."""
        self.words = ""
        """The coordinator's closing words."""
        self.trained: set[tuple[int, int]] = set()
        """Rounds and steps that it has trained."""
        self.is_alive = self.is_cut = False
        self.hung_until_s = 0.0
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def start(self) -> None:
        """Start its process, which says Hello in a session of its own."""
        self.is_alive, self.hung_until_s = True, 0.0
        self.session = Session()
        self.link = ScheduledLink(self)
        self._client = client = EdgeClient(self._config, self._rows, self, self.link)
        self.is_leaving = False
        self._thread = threading.Thread(target=self._live, args=(client,), daemon=True)
        self._thread.start()
        self.advance()

    def on_step_end(self, report: StepReport) -> None:
        """Note a step."""
        self.trained.add((report.stamp.round, report.stamp.step))

    def advance(self) -> None:
        """Let the process do all that it can do without another message."""
        self._go.release()
        self._back.acquire()

    def pause(self) -> None:
        """Wait, as the device, for the next turn."""
        self._back.release()
        self._go.acquire()

    def kill(self) -> None:
        """End the process at the message for which it waits."""
        if self.is_alive:
            self.link.is_killed = True
            self.advance()

    def leave(self) -> None:
        """Tell the process to end in order, as Ctrl-C does."""
        if self.is_alive:
            self.is_leaving = True
            self._client.stop()
            self.advance()

    def run_out_of_memory(self) -> None:
        """Let the process find no memory where it is."""
        self.link.news.append(MemoryError("no memory left"))
        self.advance()

    def lose_session(self) -> None:
        """Hear that the coordinator does not know the session; begin another one."""
        self.session = Session()
        self.link.granted = 0
        self.link.news.append(SessionLost("the coordinator does not know this session"))
        self.advance()

    def wipe(self) -> None:
        """Lose what is on disk."""
        shutil.rmtree(self._config.state, ignore_errors=True)

    def _live(self, client: EdgeClient) -> None:
        self._go.acquire()
        try:
            words = client.run()
            self.words = "" if words == STOPPED else words
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error
        finally:
            self.is_alive = False
            self._back.release()


class ScheduledGateway:
    """The door of one coordinator process; `events` lets the test do the next thing."""

    address = "scheduled"

    def __init__(self, clock: Clock, patience_s: float) -> None:
        self._clock, self._patience_s = clock, patience_s
        self.sessions: dict[str, Session] = {}
        self.next: Callable[[], list[Event]] = list
        self.fresh: list[Event] = []
        self.crash_in = 0
        """Messages and events after which the process ends; 0: never."""
        self.has_rounded = False
        """Whether a device got factors and residual of later steps instead of its own state."""
        self._is_woken = False

    def devices(self) -> list[str]:
        """Return who has a session."""
        return sorted(self.sessions)

    def stats(self, device: str) -> DeviceStats:
        """Return what is known of a connection."""
        session = self._find(device)
        return DeviceStats("0" * 32, 0, 0, 0, None, session.heard_s, {}, session.num_moved)

    def events(self, timeout_s: float) -> list[Event]:
        """Return what has happened while the test did the next thing."""
        fresh = self.fresh
        if not fresh and not self._is_woken:
            fresh = self.next() + self.fresh
        self.fresh, self._is_woken = [], False
        return fresh

    def send(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Put a message on its way."""
        session = self._find(device)
        self.come_nearer()
        if isinstance(message, RoundStart):
            self.has_rounded |= message.is_full and message.stamp.step > 0
        session.theirs.send(message, tensors)
        session.down += 1

    def come_nearer(self) -> None:
        """Come a message or an event nearer to a crash, where there is to be one."""
        if self.crash_in:
            self.crash_in -= 1
            if not self.crash_in:
                raise Crashed

    def set_limits(self, device: str, max_message_bytes: int) -> None:
        """Change the size that a message of a device may have."""
        self._find(device).theirs.set_limit(max_message_bytes)

    def drop(self, device: str, reason: str) -> None:
        """End a session when all is sent."""
        self._find(device).leave = (reason, self._clock.now_s + LEAVE_S)

    def forget(self, device: str, reason: str) -> None:
        """End a session at once; the device greets anew."""
        self._find(device)
        self.over(device, reason)

    def wake(self) -> None:
        """Let `events` return now."""
        self._is_woken = True

    def close(self) -> None:
        """End without a word."""
        self.sessions = {}

    def _find(self, device: str) -> Session:
        if device not in self.sessions:
            raise PeerGone(f"device {device!r} has no session")
        return self.sessions[device]

    # ---- what the network does ----

    def attach(self, device: str, session: Session) -> None:
        """Let a session begin; an older one of the device is over."""
        if device in self.sessions:
            self.over(device, "another process has taken over")
        session.is_attached, session.heard_s = True, self._clock.now_s
        self.sessions[device] = session
        self.fresh.append(Joined(device, "0" * 32))

    def over(self, device: str, reason: str) -> None:
        """Let go of a session."""
        del self.sessions[device]
        self.fresh.append(Left(device, reason))

    def take(self, device: str) -> None:
        """Let the next message of a device arrive."""
        session = self.sessions[device]
        session.up -= 1
        session.num_moved += 1
        envelope = session.theirs.receive(Deadline.after(0.0))
        if session.leave is None:
            self.fresh.append(Received(device, envelope))

    def look_at_clock(self, heard: set[str]) -> None:
        """Note who is heard; report who is silent, and end what has lasted too long."""
        now_s = self._clock.now_s
        for name, session in list(self.sessions.items()):
            if name in heard:
                session.heard_s = session.told_s = now_s
            silent_s = now_s - session.heard_s
            if session.leave is not None and now_s >= session.leave[1]:
                self.over(name, session.leave[0])
            elif silent_s >= self._patience_s:
                self.over(name, f"silent for {silent_s:.0f} s")
            elif now_s - session.told_s >= self._patience_s / 2:
                session.told_s = now_s
                self.fresh.append(Silent(name, silent_s))


class Network:
    """What lies between a coordinator and its devices, one movement at a time."""

    def __init__(self, clock: Clock, devices: Mapping[str, ScheduledDevice], seed: int) -> None:
        self.clock, self.devices = clock, devices
        self.gateway: ScheduledGateway
        self.compute: HeldCompute
        self._random = random.Random(seed)

    def moves(self) -> list[Callable[[], None]]:
        """Return everything that could happen next, time aside."""
        found: list[Callable[[], None]] = []
        if self.compute.is_due:
            found.append(self.compute.finish)
        for device in self.devices.values():
            for can, do in ((self._can_up, self.up), (self._can_down, self.down)):
                if can(device):
                    found.append(partial(do, device))
            if self._can_meet(device):
                found.append(partial(self._meet, device))
        return found

    def flow(self) -> bool:
        """Let one thing happen, whichever; return whether there was one."""
        moves = self.moves()
        if moves:
            self._random.choice(moves)()
        return bool(moves)

    def _knows(self, device: ScheduledDevice) -> bool:
        return self.gateway.sessions.get(device.name) is device.session

    def _can_up(self, device: ScheduledDevice) -> bool:
        is_due = device.session.up > 0 or device.session.is_closing
        return is_due and self._knows(device) and not device.is_cut

    def up(self, device: ScheduledDevice) -> None:
        """Let the next message of a device arrive, or the end of its session."""
        if self._can_up(device):
            if device.session.up:
                self.gateway.take(device.name)
            else:
                self.gateway.over(device.name, "")

    def _can_down(self, device: ScheduledDevice) -> bool:
        session, is_hung = device.session, device.hung_until_s > self.clock.now_s
        is_due = session.down > 0 or session.leave is not None
        return device.is_alive and is_due and self._knows(device) and not (device.is_cut or is_hung)

    def down(self, device: ScheduledDevice) -> None:
        """Let the next message to a device arrive, or the end of its session."""
        if not self._can_down(device):
            return
        session = device.session
        if session.down:
            session.down -= 1
            session.num_moved += 1
            device.link.granted += 1
        else:
            assert session.leave is not None
            self.gateway.over(device.name, session.leave[0])
            device.link.news.append(RefusedError(session.leave[0]))
        device.advance()

    def _can_meet(self, device: ScheduledDevice) -> bool:
        is_hung = device.hung_until_s > self.clock.now_s
        return device.is_alive and not (self._knows(device) or device.is_cut or is_hung)

    def _meet(self, device: ScheduledDevice) -> None:
        """Let a device whose session is not known find out, or begin one."""
        if device.session.is_attached:
            device.lose_session()
        else:
            self.gateway.attach(device.name, device.session)

    def pass_time(self, seconds: float) -> None:
        """Let time go by; who is alive and not cut off is heard, whatever it does."""
        self.clock.now_s += seconds
        heard = {n for n, d in self.devices.items() if d.is_alive and not d.is_cut}
        heard = {n for n in heard if self._knows(self.devices[n])}
        self.gateway.look_at_clock(heard)

    def end(self) -> None:
        """End all processes."""
        for device in self.devices.values():
            with suppress(EdgeError):
                device.kill()
