"""Reports to the modelled clock what happens in a simulated run, and writes the clock's rows.

Training counts: computing, activations, gradients, adapters, and parts of the model that a new plan
needs. Joining and evaluating do not count, as they cost every method the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from coordinator.engine.interface import Answer, Job
from coordinator.engine.local import LocalEngine
from coordinator.lab.simulation.clock import Clock, Costs, Machine, Usage
from coordinator.lab.simulation.device import SimulationListener
from coordinator.lab.simulation.traffic import TrafficCounter
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import Telemetry
from coordinator.results.run_folder import RunFolder
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.messages import (
    Activation,
    AdapterUpload,
    Gradient,
    Message,
    PlanAssigned,
    RoundStart,
    StepReport,
    TopGradient,
    TopHidden,
)
from edge_sdk.protocol.plan import Place, Plan
from profiler.estimate.flops import FlopsEstimate

CLOCK, TRAFFIC = "clock.jsonl", "traffic.jsonl"
COUNTED = (Activation, TopGradient, StepReport, AdapterUpload, Gradient, TopHidden)


class Jitter:
    """By how much longer or shorter than usual each computation of a device takes.

    Args:
        share: Largest share by which its speed differs.
        seed: Seed of what is drawn.
    """

    def __init__(self, share: float = 0.0, seed: int = 0) -> None:
        self._share, self._seed = share, seed
        self._draws: dict[str, np.random.Generator] = {}

    def factor(self, device: str) -> float:
        """Return by what the next computation of *device* is multiplied."""
        if not self._share:
            return 1.0
        if device not in self._draws:
            self._draws[device] = np.random.default_rng([self._seed, *device.encode()])
        return 1.0 / (1.0 + self._draws[device].uniform(-self._share, self._share))


class ClockListener(SimulationListener):
    """Tells the clock what devices and coordinator do."""

    def __init__(
        self, devices: Mapping[str, Machine], coordinator: Machine, jitter: Jitter | None = None
    ) -> None:
        self._jitter = jitter or Jitter()
        self.has_barriers = True
        """Whether all devices begin and end a round together."""
        self.clock = Clock(devices, coordinator)
        self.machines, self.coordinator = dict(devices), coordinator
        self.traffic = TrafficCounter()
        self.plans: dict[str, Plan] = {}
        """Plan of each device."""
        self.costs: Costs | None = None
        """Costs of the model; set before any device computes."""
        self._held: dict[str, set[str]] = {name: set() for name in devices}
        self._arrivals: dict[str, list[float]] = {name: [] for name in devices}
        self._attempt = 0

    # ---- devices ----

    def forward(self, device: str, plan: Plan, micro: MicroBatch) -> None:
        """The device's blocks, forward."""
        self._compute(device, self._own(plan, micro.input_ids).forward)

    def backward(self, device: str, plan: Plan, grad_BTD: Array) -> None:
        """The device's blocks, backward."""
        self._compute(device, self._own(plan, grad_BTD).backward)

    def tail(self, device: str, plan: Plan, micro: MicroBatch) -> None:
        """Final norm and head, both ways."""
        last = self._costs.num_blocks
        self._both(device, self._costs.flops(last, last, {}, *micro.input_ids.shape, tail=True))

    def local(self, device: str, plan: Plan, micro: MicroBatch) -> None:
        """The whole model, both ways."""
        shape, last = micro.input_ids.shape, self._costs.num_blocks
        self._both(device, self._costs.flops(0, last, plan.ranks, *shape, front=True, tail=True))

    @property
    def _costs(self) -> Costs:
        assert self.costs is not None, "a device computes before the model is known"
        return self.costs

    def _own(self, plan: Plan, batch: np.ndarray) -> FlopsEstimate:
        """The device's blocks for a *batch* (B, T) or (B, T, D)."""
        return self._costs.flops(0, plan.split, plan.ranks, *batch.shape[:2], front=True)

    def _both(self, device: str, flops: FlopsEstimate) -> None:
        self._compute(device, flops.total)

    def _compute(self, device: str, flops: float) -> None:
        self.clock.compute(device, flops * self._jitter.factor(device))

    # ---- what travels ----

    def up(self, device: str, message: Message, num_bytes: int) -> None:
        """A device has sent a message."""
        if _counts(message):
            self.clock.upload(device, num_bytes, _name_of(message))
            self.traffic.count(device, "up", message, num_bytes)
        self._arrivals[device].append(self.clock.arrival_s(device))

    def take_arrivals(self, device: str) -> list[float]:
        """Return when what *device* has sent since the last call reaches the coordinator."""
        taken, self._arrivals[device] = self._arrivals[device], []
        return taken

    def now_s(self) -> float:
        """Return the seconds that have passed for the coordinator."""
        return self.clock.now_s

    def wait_until(self, now_s: float) -> None:
        """Let the coordinator do nothing until then."""
        self.clock.wait_until(now_s)

    def down(self, device: str, message: Message, num_bytes: int) -> None:
        """The coordinator has sent a message."""
        if isinstance(message, PlanAssigned):
            self._assign(device, message)
        elif isinstance(message, RoundStart) and message.end_step > message.stamp.step:
            if message.stamp.attempt > self._attempt:  # what ran before is over
                self._attempt = message.stamp.attempt
                if self.has_barriers:
                    self.clock.serve(self.machines)
            self.clock.download(device, num_bytes)
            self.traffic.count(device, "down", message, num_bytes)
        elif _counts(message):
            self.clock.download(device, num_bytes, _name_of(message))
            self.traffic.count(device, "down", message, num_bytes)

    def received(self, device: str, message: Message) -> None:
        """A device has taken in a message."""
        if (what := _name_of(message)) is not None:
            self.clock.receive(device, what)

    def _assign(self, device: str, assigned: PlanAssigned) -> None:
        """Count the parts that a new plan needs; those of the first are there already."""
        self.plans[device] = assigned.plan
        missing = [part for part in assigned.parts if part.sha256 not in self._held[device]]
        self._held[device] |= {part.sha256 for part in missing}
        if self._attempt and missing:
            num_bytes = sum(part.num_bytes for part in missing)
            self.clock.download(device, num_bytes)
            self.traffic.count(device, "down", assigned, num_bytes)

    # ---- the coordinator ----

    def serve(
        self,
        jobs: Sequence[Job],
        ranks: Mapping[str, int],
        message: tuple[type, int],
        *,
        up: bool,
        down: bool,
        tail: bool,
    ) -> None:
        """Run the coordinator's blocks for each of *jobs*: forward (up), backward (down).

        Args:
            jobs: The wave.
            ranks: Ranks of the coordinator's adapters.
            message: Kind and step of the messages that it has waited for.
            up: Whether it runs forward.
            down: Whether it runs backward.
            tail: Whether the loss is its own.
        """
        total, last = 0.0, self._costs.num_blocks
        # By name, as a sum of floats depends on its order.
        for job in sorted(jobs, key=lambda job: job.place):
            flops = self._costs.flops(job.split, last, ranks, *job.hidden_BTD.shape[:2], tail=tail)
            total += up * flops.forward + down * flops.backward
            self.clock.await_message(job.device, (*message, job.micro))
        self.clock.serve((), total)


def _name_of(message: Message) -> Hashable:
    """Return the name of a message that may be waited for after later ones have come."""
    if isinstance(message, Activation | TopGradient | TopHidden | Gradient):
        return type(message), message.stamp.step, message.micro
    return None


def _counts(message: Message) -> bool:
    return isinstance(message, COUNTED) and not getattr(message, "is_eval", False)


class TimedEngine(LocalEngine):
    """An engine whose waves take modelled time; everything else it does takes none."""

    def __init__(self, listener: ClockListener, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._listener = listener
        self._jobs: dict[Place, Job] = {}
        """What is between its forward and its backward."""
        self._step = 0
        """Step of these."""

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Run forward, loss and backward of a wave; see `Engine`."""
        message = (Activation, step)
        self._listener.serve(jobs, self.ranks, message, up=True, down=True, tail=True)
        return super().train(jobs, step, wave)

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Run forward for a wave whose labels stay on the devices; see `Engine`."""
        self._jobs |= {job.place: job for job in jobs}
        self._step = step
        message = (Activation, step)
        self._listener.serve(jobs, self.ranks, message, up=True, down=False, tail=False)
        return super().forward(jobs, step, wave, keeps=keeps)

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go back through what `forward` has left of these micro-batches; see `Engine`."""
        jobs = [self._jobs.pop(place) for place in grads]
        message = (TopGradient, self._step)
        self._listener.serve(jobs, self.ranks, message, up=False, down=True, tail=False)
        return super().backward(grads)


class ClockWatcher:
    """Writes a row of the clock at the end of each round."""

    def __init__(self, folder: RunFolder, listener: ClockListener) -> None:
        self._folder, self._listener = folder, listener
        self.plans: list[dict[str, Plan]] = []
        """Plan of each device, round by round."""

    def see(self, event: RunEvent) -> None:
        """Write what the round would have cost on the modelled machines."""
        if isinstance(event, Telemetry):
            self.plans.append(dict(sorted(self._listener.plans.items())))
            self._folder.append(CLOCK, clock_row(event.round + 1, self._listener))
            traffic = {"round": event.round + 1, "devices": self._listener.traffic.read()}
            self._folder.append(TRAFFIC, traffic)


def clock_row(round_: int, listener: ClockListener) -> dict[str, Any]:
    """Read the clock at the end of a round.

    Returns:
        Seconds since the start and of the round; for each device and the coordinator the time in
        which it computed and its share of the round, joules, and the traffic of its link.
    """
    reading = listener.clock.read(is_barrier=listener.has_barriers)
    devices = {
        name: _costs_of(usage, listener.machines[name], reading.round_s)
        | {"split": listener.plans[name].split}
        for name, usage in sorted(reading.devices.items())
    }
    server = _costs_of(reading.coordinator, listener.coordinator, reading.round_s)
    return {
        "round": round_,
        "modelled": True,
        "seconds": reading.seconds,
        "round_seconds": reading.round_s,
        "devices": devices,
        "coordinator": {n: server[n] for n in ("compute_s", "busy", "energy_j")},
    }


def _costs_of(usage: Usage, machine: Machine, round_s: float) -> dict[str, Any]:
    busy = usage.compute_s / round_s if round_s else 0.0
    return asdict(usage) | {"busy": busy, "energy_j": usage.compute_s * machine.watts}
