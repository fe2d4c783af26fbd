"""A modelled clock: how long a run would take on other machines. Pure; times are not measured.

Each device computes by itself and at the same time as the others; its link carries one message at
a time in each direction; the coordinator is one resource that serves one wave after the other.

    device forward -> up -> coordinator forward and backward -> down -> device backward

The caller reports what happens, causes before effects; this file adds up the times. Waiting is
free; energy is power times the time in which something is computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from profiler.estimate.flops import FlopsEstimate, estimate_flops
from profiler.estimate.sizes import ModelShape, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Speeds of a device and its link, or of the coordinator (whose links are the devices')."""

    flops_per_s: float
    watts: float = 0.0
    up_bytes_per_s: float = float("inf")
    """Rate from the device to the coordinator."""
    down_bytes_per_s: float = float("inf")
    round_trip_s: float = 0.0

    def slowed(self, factor: float) -> Machine:
        """Return the machine when it computes and sends so many times slower."""
        return replace(
            self,
            flops_per_s=self.flops_per_s / factor,
            up_bytes_per_s=self.up_bytes_per_s / factor,
            down_bytes_per_s=self.down_bytes_per_s / factor,
        )


@dataclass(slots=True)
class Usage:
    """What one machine has done since the last reading."""

    compute_s: float = 0.0
    up_s: float = 0.0
    """Seconds in which its uplink was busy."""
    down_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class _Node:
    """State of one machine: its own time, and that of its messages."""

    machine: Machine
    now_s: float = 0.0
    up_free_s: float = 0.0
    down_free_s: float = 0.0
    arrived_s: float = 0.0
    """Time at which its last message reached the coordinator."""
    arrivals_s: dict[Hashable, float] = field(default_factory=dict)
    """Times at which messages reached the coordinator that will wait for them, by name."""
    answers_s: dict[Hashable, float] = field(default_factory=dict)
    """Times at which messages reached the device that will wait for them, by name."""
    usage: Usage = field(default_factory=Usage)

    def compute(self, flops: float) -> None:
        seconds = flops / self.machine.flops_per_s
        self.now_s += seconds
        self.usage.compute_s += seconds


@dataclass(frozen=True, slots=True)
class ClockReading:
    """What a clock shows at the end of a round."""

    seconds: float
    """Seconds since the start."""
    round_s: float
    """Seconds since the last reading."""
    devices: dict[str, Usage]
    coordinator: Usage


class Clock:
    """Time of one run: a coordinator and its devices, all at 0 when it is made."""

    def __init__(self, devices: Mapping[str, Machine], coordinator: Machine) -> None:
        self._devices = {name: _Node(machine) for name, machine in devices.items()}
        self._coordinator = _Node(coordinator)
        self._read_s = 0.0

    @property
    def now_s(self) -> float:
        """Seconds that have passed for the coordinator."""
        return self._coordinator.now_s

    def wait_until(self, now_s: float) -> None:
        """Let the coordinator do nothing until then."""
        self._coordinator.now_s = max(self._coordinator.now_s, now_s)

    def arrival_s(self, device: str) -> float:
        """Return when all that *device* has sent so far has reached the coordinator."""
        node = self._devices[device]
        return max(node.arrived_s, node.now_s)

    def compute(self, device: str, flops: float) -> None:
        """Let *device* compute; nobody else waits for that."""
        self._devices[device].compute(flops)

    def upload(self, device: str, num_bytes: int, what: Hashable = None) -> None:
        """Let *device* send a message as soon as its uplink is free; it does not wait for that.

        Args:
            device: The sender.
            num_bytes: Size of the message.
            what: Its name, if the coordinator will wait for this one and not for the last.
        """
        node = self._devices[device]
        seconds = num_bytes / node.machine.up_bytes_per_s
        node.up_free_s = max(node.now_s, node.up_free_s) + seconds
        node.arrived_s = node.up_free_s + node.machine.round_trip_s / 2
        if what is not None:
            node.arrivals_s[what] = node.arrived_s
        node.usage.up_s += seconds
        node.usage.bytes_up += num_bytes

    def await_message(self, device: str, what: Hashable) -> None:
        """Let the coordinator wait for the message of that name, if it has not had it before."""
        self.wait_until(self._devices[device].arrivals_s.pop(what, 0.0))

    def serve(self, devices: Iterable[str], flops: float = 0.0) -> None:
        """Let the coordinator compute what needs the last message of each of *devices*.

        Args:
            devices: The senders of the messages.
            flops: Operations that it computes.
        """
        node = self._coordinator
        arrivals = [self._devices[device].arrived_s for device in devices]
        node.now_s = max((node.now_s, *arrivals))
        node.compute(flops)

    def download(self, device: str, num_bytes: int, what: Hashable = None) -> None:
        """Let the coordinator send a message now; *device* waits for it.

        Args:
            device: The receiver.
            num_bytes: Size of the message.
            what: Its name, if the device has other things to do until it calls `receive`.
        """
        node = self._devices[device]
        seconds = num_bytes / node.machine.down_bytes_per_s
        node.down_free_s = max(self._coordinator.now_s, node.down_free_s) + seconds
        there_s = node.down_free_s + node.machine.round_trip_s / 2
        if what is None:
            node.now_s = max(node.now_s, there_s)
        else:
            node.answers_s[what] = there_s
        node.usage.down_s += seconds
        node.usage.bytes_down += num_bytes

    def receive(self, device: str, what: Hashable) -> None:
        """Let *device* wait for the message of that name, if one was sent."""
        node = self._devices[device]
        node.now_s = max(node.now_s, node.answers_s.pop(what, 0.0))

    def read(self, *, is_barrier: bool = True) -> ClockReading:
        """End a round; usage then begins at 0 again.

        Args:
            is_barrier: Whether it ends when all that was sent has arrived; else it does now.
        """
        if is_barrier:
            self.serve(self._devices)
        now_s = self._coordinator.now_s
        reading = ClockReading(
            seconds=now_s,
            round_s=now_s - self._read_s,
            devices={name: node.usage for name, node in self._devices.items()},
            coordinator=self._coordinator.usage,
        )
        self._read_s = now_s
        for node in (*self._devices.values(), self._coordinator):
            node.usage = Usage()
        return reading


def central_step_s(flops: float, machine: Machine) -> float:
    """Return the seconds of a centralised step, *flops* forward and backward, on *machine*."""
    return flops / machine.flops_per_s


class Costs:
    """Numbers of operations of stretches of one model."""

    def __init__(self, shape: ModelShape, num_blocks: int) -> None:
        self._shape, self.num_blocks = shape, num_blocks
        self._counted = lru_cache(4096)(self._count)

    def flops(
        self,
        first: int,
        stop: int,
        ranks: Mapping[str, int],
        num_sequences: int,
        num_positions: int,
        *,
        front: bool = False,
        tail: bool = False,
    ) -> FlopsEstimate:
        """Return the operations of blocks first .. stop-1 for a micro-batch, forward and backward.

        Args:
            first: First block.
            stop: The block after the last.
            ranks: Rank of each adapted weight.
            num_sequences: Sequences of the micro-batch.
            num_positions: Tokens of its longest sequence, as padding is computed too.
            front: Whether embeddings belong to it.
            tail: Whether final norm and head belong to it.
        """
        work = (first, stop, front, tail, tuple(ranks.items()), num_sequences, num_positions)
        return self._counted(*work)

    def _count(
        self,
        first: int,
        stop: int,
        front: bool,
        tail: bool,
        ranks: tuple[tuple[str, int], ...],
        num_sequences: int,
        num_positions: int,
    ) -> FlopsEstimate:
        work = Work(
            first=first,
            stop=stop,
            has_front=front,
            has_tail=tail,
            ranks=dict(ranks),
            micro_batch=num_sequences,
            length=num_positions,
            trains_head=tail,  # where a head is trained
        )
        return estimate_flops(self._shape, work)
