"""A gateway to devices that live in this process: the same messages, no sockets.

The coordinator asks for events; before it gets any, each device with news has its turn, in the
order of the names. Nothing waits for a real clock. In modelled time, the coordinator gets what has
reached it by then; else all that there is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from coordinator.gateway.interface import DeviceStats, Event, Left, Received, Rejected
from coordinator.gateway.traffic import Traffic
from coordinator.lab.simulation.arrivals import Arrivals
from coordinator.lab.simulation.device import SimulatedDevice, SimulationListener
from edge_sdk.deadline import Deadline
from edge_sdk.errors import (
    EdgeError,
    PeerGone,
    ReceiveTimeout,
    RemoteProtocolError,
    TransportError,
)
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import Message, RoundSkipped, RoundStart, StepReport
from edge_sdk.transport.link import NO_TENSORS


class SimulatedGateway(AbstractContextManager["SimulatedGateway"]):
    """The `Gateway` to simulated devices."""

    address = "memory"

    def __init__(
        self,
        devices: Mapping[str, SimulatedDevice],
        listener: SimulationListener,
        *,
        is_timed: bool = False,
    ) -> None:
        self._present = dict(sorted(devices.items()))
        self._all = list(self._present.values())
        self._listener = listener
        self._is_woken, self._is_timed = False, is_timed
        self._arrivals = Arrivals()
        self._traffic = {name: Traffic() for name in devices}
        self._waiting: set[str] = set()
        """Devices that a round goes on without."""

    def devices(self) -> list[str]:
        """Return the names of all devices with a session; see `Gateway`."""
        return list(self._present)

    def stats(self, device: str) -> DeviceStats:
        """Return what is known about a connection; see `Gateway`."""
        stats = self._find(device).link.stats()
        return DeviceStats(
            session="0" * 32,
            bytes_up=stats.bytes_down,  # our end of the link: what comes in was sent up
            bytes_down=stats.bytes_up,
            reconnects=0,
            rtt_s=stats.rtt_s,
            heard_s=time.monotonic(),
            telemetry={},
            num_moved=stats.bytes_down + stats.bytes_up,
            traffic=self._traffic[device].counts(),
        )

    def events(self, timeout_s: float) -> list[Event]:
        """Return what the devices have done; *timeout_s* is not waited for.

        Raises:
            EdgeError: a device has failed, as that says.
            TransportError: everybody waits for everybody else.
        """
        is_woken, self._is_woken = self._is_woken, False
        if is_woken and not self._is_timed:  # the coordinator has something to do itself
            return []
        events: list[Event] = []
        due = [device for device in self._all if device.is_due and not device.is_over]
        for device in due:
            device.advance()
            heard = self._heard(device)
            if self._is_timed:
                self._arrivals.add(device.name, heard, self._listener.take_arrivals(device.name))
            else:
                events += heard
            for name in self._gone_meanwhile(heard):
                if self._is_timed:
                    self._arrivals.add(name, [Left(name)], ())
                else:
                    events.append(Left(name))
            _raise_failure(device)
        if self._is_timed:
            events = self._arrived(may_wait=not is_woken)
        is_still = not (due or events or is_woken or self._arrivals)
        if is_still and any(not device.is_over for device in self._all):
            raise TransportError("the simulation stands still: every device waits for a message")
        return events

    def _arrived(self, *, may_wait: bool) -> list[Event]:
        """Return what has reached the coordinator by now, or what does so next."""
        events = self._arrivals.until(self._listener.now_s())
        if not events and may_wait and self._arrivals:
            self._listener.wait_until(self._arrivals.first_s())
            events = self._arrivals.until(self._arrivals.first_s())
        return events

    def _heard(self, device: SimulatedDevice) -> list[Event]:
        """Return what *device* has sent in its turn."""
        events: list[Event] = []
        while device.name in self._present:
            try:
                envelope = device.link.receive(Deadline.after(0.0))
            except ReceiveTimeout:
                break
            except RemoteProtocolError as error:
                events.append(Rejected(device.name, str(error)))
            except PeerGone:
                del self._present[device.name]
                events.append(Left(device.name))
            else:
                self._traffic[device.name].add(envelope.message, envelope.num_bytes)
                events.append(Received(device.name, envelope))
                message = envelope.message
                if isinstance(message, StepReport) and _is_last(device, message):
                    del self._present[device.name]
                    device.close()
                    events.append(Left(device.name))
        return events

    def _gone_meanwhile(self, heard: list[Event]) -> Iterator[str]:
        """Let devices go whose last step others train in a round without them."""
        reports = [e.envelope.message for e in heard if isinstance(e, Received)]
        for report in reports:
            for name in sorted(self._waiting & self._present.keys()):
                if isinstance(report, StepReport) and _is_last(self._present[name], report):
                    self._present.pop(name).close()
                    yield name

    def send(
        self, device: str, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        """Give *message* to *device*, which reads it in its next turn; see `Gateway`."""
        receiver = self._find(device)
        before = receiver.link.stats().bytes_up
        receiver.link.send(message, tensors)
        receiver.is_due = True
        if isinstance(message, RoundSkipped):
            self._waiting.add(device)
        elif isinstance(message, RoundStart):
            self._waiting.discard(device)
        num_bytes = receiver.link.stats().bytes_up - before
        self._traffic[device].add(message, num_bytes)
        self._listener.down(device, message, num_bytes)

    def set_limits(self, device: str, max_message_bytes: int) -> None:
        """Change the size that a message of *device* may have; see `Gateway`."""
        self._find(device).link.set_limit(max_message_bytes)

    def drop(self, device: str, reason: str) -> None:
        """End the session of *device*, which finds out after it has read what was sent."""
        dropped = self._find(device)
        dropped.link.close()
        dropped.is_due = True
        del self._present[device]

    def forget(self, device: str, reason: str) -> None:
        """End the session of *device*, which cannot greet anew: nobody here is ever silent."""
        self.drop(device, reason)

    def wake(self) -> None:
        """Make `events` return now; see `Gateway`."""
        self._is_woken = True

    def _find(self, device: str) -> SimulatedDevice:
        found = self._present.get(device)
        if found is None:
            raise PeerGone(f"device {device!r} has no session")
        return found

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all devices."""
        self._present = {}
        for device in self._all:
            device.close()


def _is_last(device: SimulatedDevice, report: StepReport) -> bool:
    """Return whether *device* is meant to be gone after that step, its own or that of others."""
    last = device.leaves_after_step
    return last is not None and report.stamp.step + 1 >= last


def _raise_failure(device: SimulatedDevice) -> None:
    error = device.error
    if isinstance(error, EdgeError):
        kind: type[EdgeError] = type(error)
        raise kind(f"device {device.name!r}: {error}") from error
    if error is not None:
        raise error
