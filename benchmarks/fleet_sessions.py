"""Many devices in one process that compute nothing: real sessions, real messages, no model.

Each has the I/O of a device as it is (`DeviceIo`: two DEALER sockets with CURVE, their monitors,
acks, heartbeats, reconnects), but all share a thread, a ZeroMQ context and an epoll. What a
device says of a step is drawn once; factors are those that it was handed, a little moved.
"""

from __future__ import annotations

import heapq
import json
import queue
import random
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from edge_sdk.errors import EdgeError, SessionLost
from edge_sdk.protocol.fragments import Envelope, OutgoingMessage, TensorOut
from edge_sdk.protocol.messages import (
    PROTOCOL_VERSION,
    Activation,
    AdapterUpload,
    EvalReport,
    Goodbye,
    Gradient,
    Hello,
    Pause,
    Paused,
    PlanAssigned,
    Ready,
    RoundStart,
    Stamp,
    StepReport,
    TopGradient,
    TopHidden,
    Welcome,
)
from edge_sdk.transport.io_thread import DeviceIo
from edge_sdk.transport.keys import KeyPair
from edge_sdk.transport.link import NO_TENSORS, LinkConfig, package_version

# What a board says of itself with every heartbeat.
READINGS = {f"reading_{number}": 1.0 + number for number in range(20)}
# Sockets of a context: two lanes and two monitors a device, and both ends of each monitor.
SOCKETS_EACH = 16
GOODBYE = "stopped"
LOG_EVERY_S = 0.5
BUSY_TURNS = 64
INFINITY = float("inf")


class Sessions:
    """All devices of a process, and what they wait for."""

    def __init__(self, log: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.epoll = select.epoll()
        self.owners: dict[int, Device] = {}
        self.up = self.down = 0
        self._log = log.open("a", encoding="utf-8")
        self._lines: list[str] = []
        self._due: list[tuple[float, int, Device]] = []
        self._count = 0
        self._log_s = 0.0

    def reserve(self, devices: int) -> None:
        """Let the context have sockets for so many devices."""
        self.context.set(zmq.MAX_SOCKETS, SOCKETS_EACH * (devices + 16))

    def note(self, **row: Any) -> None:
        """Write a line down."""
        self._lines.append(json.dumps(row))

    def at(self, due_s: float, device: Device) -> None:
        """Let a device have its turn at a time."""
        self._count += 1
        heapq.heappush(self._due, (due_s, self._count, device))

    def run(self, until_s: float) -> None:
        """Serve all devices until a time of the monotonic clock."""
        while (now_s := time.monotonic()) < until_s:
            wait_s = min(until_s, self._due[0][0] if self._due else until_s) - now_s
            ready = self.epoll.poll(max(0.0, wait_s), 256)
            turns = dict.fromkeys(self.owners[fd] for fd, _ in ready if fd in self.owners)
            now_s = time.monotonic()
            while self._due and self._due[0][0] <= now_s:
                turns[heapq.heappop(self._due)[2]] = None
            for device in turns:
                device.turn(now_s)
            if now_s >= self._log_s:
                self._log_s = now_s + LOG_EVERY_S
                self.note(kind="count", at=now_s, up=self.up, down=self.down)
                self.flush()

    def flush(self) -> None:
        """Bring all lines to the file."""
        self._log.write("".join(line + "\n" for line in self._lines))
        self._log.flush()
        self._lines.clear()

    def close(self) -> None:
        """Let go of sockets and files, once no device has a session."""
        self.flush()
        self._log.close()
        self.epoll.close()
        self.context.destroy(linger=0)


class SharedPoller:
    """Stands where a device's own poller stands, and reports to the epoll of all."""

    def __init__(self, sessions: Sessions, device: Device) -> None:
        self._sessions, self._device = sessions, device
        self._flags: dict[zmq.Socket[bytes], int] = {}
        self.found = False
        """Whether the last look has found anything."""

    def register(self, source: Any, flags: int = zmq.POLLIN) -> None:
        """Watch a socket; a waker is of no use here, as everything is in one thread."""
        if isinstance(source, zmq.Socket):
            descriptor = int(source.getsockopt(zmq.FD))
            self._flags[source] = flags
            self._sessions.owners[descriptor] = self._device
            self._sessions.epoll.register(descriptor, select.EPOLLIN)

    def modify(self, source: Any, flags: int) -> None:
        """Watch a socket for something else."""
        self._flags[source] = flags

    def unregister(self, source: Any) -> None:
        """Watch a socket no more."""
        if self._flags.pop(source, None) is not None:
            descriptor = int(source.getsockopt(zmq.FD))
            self._sessions.owners.pop(descriptor, None)
            self._sessions.epoll.unregister(descriptor)

    def poll(self, _timeout_ms: int) -> list[tuple[Any, int]]:
        """Return what is there now; nobody waits here."""
        ready = []
        for source, flags in self._flags.items():
            if state := int(source.getsockopt(zmq.EVENTS)) & flags:
                ready.append((source, state))
        self.found = bool(ready)
        return ready


class SharedIo(DeviceIo):
    """A device's own I/O, moved on by whoever has the thread."""

    known_epoch = 0
    """Number of sessions that the device knows to be lost, as `ZmqLink` counts them."""

    def open(self) -> None:
        """Connect."""
        self._open()

    def turn(self) -> bool:
        """Do what there is to do; return whether there may be more."""
        self._turn()
        return self._poller.found or self._has_more or bool(self.commands)  # type: ignore[attr-defined]

    @property
    def next_s(self) -> float:
        """When it wants to have its turn, whatever arrives."""
        return min(self._tick_s, INFINITY if self._ack_s is None else self._ack_s)

    def say(self, message: Any, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Queue a message; it is dropped where its session is lost, which is told later."""
        self.commands.append(("send", self.known_epoch, OutgoingMessage(message, tensors)))

    def close(self, *, politely: bool) -> None:
        """End; without manners nobody is told."""
        if politely:
            self._farewell()
        for line in self._lines:
            line.close()
        self.waker.close()


@dataclass(frozen=True)
class FleetFacts:
    """What all devices of a benchmark have in common."""

    address: str
    server_key: str
    batch: int
    tokens: int
    width: int
    labels: str


class Device:
    """One device: says what a device says, as soon as it may."""

    def __init__(self, sessions: Sessions, facts: FleetFacts, name: str, keys: KeyPair) -> None:
        self.name = name
        self._sessions, self._facts, self._keys = sessions, facts, keys
        self._draw = np.random.default_rng(int(name[1:]))
        shape = (facts.batch, facts.tokens, facts.width)
        self._hidden = self._draw.standard_normal(shape, dtype=np.float32)
        self._top = np.full(shape, 1e-3, np.float32)
        self._lengths = np.full(facts.batch, facts.tokens, np.int32)
        self._labels = self._draw.integers(1, 32, shape[:2]).astype(np.int32)
        self._targets = facts.batch * (facts.tokens - 1)
        self._io: SharedIo | None = None
        self._due_s = INFINITY
        self._factors: dict[str, np.ndarray] = {}
        self._stamp, self._end_step = Stamp(), 0

    # ---- life ----

    def start(self) -> None:
        """Connect and greet."""
        facts = self._facts
        config = LinkConfig(
            address=facts.address, server_key=facts.server_key, keys=self._keys, name=self.name
        )
        poller: Any = SharedPoller(self._sessions, self)
        self._io = SharedIo(
            config,
            lambda: READINGS,
            package_version(),
            _context=self._sessions.context,
            _poller=poller,
        )
        self._io.open()
        self._greet()
        self._later(time.monotonic())

    def leave(self, *, politely: bool) -> None:
        """End the session, with a goodbye or as if the device had been switched off."""
        if self._io is None:
            return
        if politely:
            self._io.say(Goodbye(stamp=self._stamp, reason=GOODBYE))
            self._io.turn()
        self._io.close(politely=politely)
        self._io = None

    @property
    def is_away(self) -> bool:
        """Whether it has no session."""
        return self._io is None

    def turn(self, now_s: float) -> None:
        """Do what there is to do."""
        if now_s >= self._due_s:
            self._due_s = INFINITY
        for _ in range(BUSY_TURNS):
            if self._io is None or not (self._io.turn() | self._take_in()):
                break
        if self._io is not None:
            self._later(self._io.next_s)

    def _later(self, due_s: float) -> None:
        if due_s < self._due_s:
            self._due_s = due_s
            self._sessions.at(due_s, self)

    # ---- messages ----

    def _take_in(self) -> bool:
        """Take what has arrived; return whether there was anything."""
        found = False
        while self._io is not None:
            try:
                epoch, item = self._io.inbox.get_nowait()
            except queue.Empty:
                break
            found = True
            if isinstance(item, Envelope):
                self._io.took(epoch, item)
                self._sessions.down += 1
                self._on(item)
            elif isinstance(item, SessionLost):
                self._io.has_error_posted, self._io.known_epoch = False, epoch + 1
                self._sessions.note(kind="lost", name=self.name)
                self._greet()
            elif isinstance(item, EdgeError):
                self._io.has_error_posted = False
                error = f"{type(item).__name__}: {item}"
                self._sessions.note(kind="error", name=self.name, error=error)
        return found

    def _say(self, message: Any, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        assert self._io is not None
        self._sessions.up += 1
        self._io.say(message, tensors)

    def _greet(self) -> None:
        self._stamp = Stamp()
        self._say(
            Hello(
                stamp=self._stamp,
                protocol=PROTOCOL_VERSION,
                sdk_version=package_version(),
                codecs=("float32",),
            )
        )

    def _on(self, envelope: Envelope) -> None:
        message = envelope.message
        match message:
            case Welcome():
                self._stamp = message.stamp
            case PlanAssigned():
                self._say_ready()
            case RoundStart():
                self._begin(message, envelope.tensors)
            case TopHidden() if message.stamp == self._stamp:
                top = {"grad": (self._top, "float32")}
                self._say(TopGradient(stamp=self._stamp, micro=message.micro), top)
            case Gradient() if message.stamp == self._stamp:
                assert envelope.tensors["grad"].shape == self._hidden.shape
                self._end_step_of(message)
            case Pause():
                self._pause(message)
            case _ if type(message).__name__ in ("Refused", "Failure", "RunOver"):
                self._sessions.note(kind="error", name=self.name, error=repr(message)[:300])

    def _say_ready(self) -> None:
        self._say(
            Ready(
                stamp=self._stamp,
                vocab_size=16,
                num_samples=1000,
                held_steps=(),
                looks_ahead=True,
                marks=True,
            )
        )

    def _pause(self, pause: Pause) -> None:
        if pause.stamp == self._stamp:
            self._say(Paused(stamp=self._stamp))
        if not pause.goes_on:
            self._stamp = replace(self._stamp, attempt=-1)

    def _begin(self, start: RoundStart, tensors: Mapping[str, np.ndarray]) -> None:
        stamp = start.stamp
        self._sessions.note(
            kind="start", at=time.monotonic(), round=stamp.round, attempt=stamp.attempt
        )
        self._factors |= {n: np.array(t) for n, t in tensors.items() if n[-2:] in (".A", ".B")}
        self._stamp, self._end_step = stamp, start.end_step
        if start.evaluate:
            self._say(EvalReport(stamp=stamp, loss_sum=0.0, num_targets=0, num_correct=0))
        if start.end_step > stamp.step:
            self._send_step()

    def _send_step(self) -> None:
        tensors: dict[str, TensorOut] = {
            "hidden": (self._hidden, "float32"),
            "lengths": (self._lengths, "int32"),
        }
        if self._facts.labels == "server":
            tensors["labels"] = (self._labels, "int32")
        message = Activation(stamp=self._stamp, micro=0, num_micro=1, num_targets=self._targets)
        self._say(message, tensors)

    def _end_step_of(self, gradient: Gradient) -> None:
        facts, stamp = self._facts, gradient.stamp
        self._stamp = replace(stamp, step=stamp.step + 1)
        self._say(
            StepReport(
                stamp=stamp,
                loss=1.0,
                num_targets=self._targets,
                num_sequences=facts.batch,
                num_tokens=facts.batch * facts.tokens,
                compute_s=0.0,
                wait_s=0.0,
                peak_bytes=2**30,
            )
        )
        self._sessions.note(
            kind="step",
            at=time.monotonic(),
            name=self.name,
            round=stamp.round,
            attempt=stamp.attempt,
            step=stamp.step,
        )
        if self._stamp.step < self._end_step:
            self._send_step()
            return
        for name, factor in self._factors.items():
            moved = self._draw.standard_normal(factor.shape, dtype=np.float32)
            self._factors[name] = factor + np.float32(1e-4) * moved
        upload: dict[str, TensorOut] = {n: (f, "float32") for n, f in self._factors.items()}
        self._say(AdapterUpload(stamp=self._stamp), upload)


class Churn:
    """Lets devices go and come back."""

    def __init__(self, sessions: Sessions, devices: list[Device], per_minute: float, seed: int):
        self._sessions, self._devices = sessions, devices
        self._draw = random.Random(seed)
        self._mean_s = 60.0 / (per_minute * len(devices)) if per_minute else INFINITY
        self._next_s = INFINITY
        self._back: list[tuple[float, int, Device]] = []

    def begin(self) -> None:
        """Let the first one go soon."""
        if self._mean_s < INFINITY:
            self._next_s = time.monotonic() + self._draw.expovariate(1.0 / self._mean_s)

    @property
    def next_s(self) -> float:
        """When the next one goes or comes back."""
        return min(self._next_s, self._back[0][0] if self._back else INFINITY)

    def turn(self, now_s: float) -> None:
        """Let those go and come back whose time it is; every other one without a word."""
        while now_s >= self._next_s:
            self._next_s += self._draw.expovariate(1.0 / self._mean_s)
            device = self._draw.choice(self._devices)
            if not device.is_away:
                politely = self._draw.random() < 0.5
                device.leave(politely=politely)
                self._sessions.note(kind="left", name=device.name, politely=politely)
                back_s = now_s + self._draw.uniform(0.5, 5.0 if politely else 2.0)
                heapq.heappush(self._back, (back_s, id(device), device))
        while self._back and self._back[0][0] <= now_s:
            heapq.heappop(self._back)[2].start()


def serve_devices(
    folder: Path, number: int, names: list[str], facts: FleetFacts, churn: tuple[float, float]
) -> None:
    """Be the devices of one process, for ever.

    Args:
        folder: Where the keys are, and where the log of the process is written.
        number: Of the process.
        names: Of the devices.
        facts: What all have in common.
        churn: Share of the devices that leaves in a minute, and the seconds before the first.
    """
    sessions = Sessions(folder / f"devices-{number}.jsonl")
    sessions.reserve(len(names))
    keys = json.loads((folder / "keys.json").read_text())
    devices = [Device(sessions, facts, name, KeyPair(*keys[name])) for name in names]
    for device in devices:
        device.start()
        sessions.run(time.monotonic() + 0.002)
    per_minute, begins_s = churn
    coming = Churn(sessions, devices, per_minute, number)
    sessions.run(time.monotonic() + begins_s)
    coming.begin()
    while True:
        sessions.run(min(time.monotonic() + 1.0, coming.next_s))
        coming.turn(time.monotonic())
