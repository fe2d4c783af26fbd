"""One simulated device: a real participant in a thread of its own, which runs only when told to.

Only one thread of the simulation runs at any time, so that equal simulations do the same things in
the same order. One thread computes for all devices, as torch holds threads of its own for every
thread that calls it. Knows no rounds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import torch

from edge_sdk.client.callbacks import Callback
from edge_sdk.client.config import ClientConfig
from edge_sdk.client.incoming import RunEnded, Stopped
from edge_sdk.client.participant import Participant
from edge_sdk.client.setup import Ask, Dataset, RuntimeSetup
from edge_sdk.data.batches import MicroBatch
from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError, ReceiveTimeout
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.fragments import Envelope, TensorOut
from edge_sdk.protocol.messages import Message, PlanAssigned, Welcome
from edge_sdk.protocol.plan import Part, Plan
from edge_sdk.runtime.interface import MemoryUse, Runtime, TailSums
from edge_sdk.runtime.torch_runtime import pick_device
from edge_sdk.runtime.training_state import TrainingState
from edge_sdk.transport.link import NO_TENSORS, LinkStats
from edge_sdk.transport.memory_link import MemoryLink, memory_pair

P = ParamSpec("P")
T = TypeVar("T")

FIRST_LIMIT_BYTES = 1024 * 1024
"""Largest payload of a device's message until another is set, as with the real gateway."""


class SimulationListener:
    """Hears what devices compute and what travels, causes before effects; this one ignores it."""

    def forward(self, device: str, plan: Plan, micro: MicroBatch) -> None:
        """The device's blocks, forward."""

    def backward(self, device: str, plan: Plan, grad_BTD: Array) -> None:
        """The same blocks, backward."""

    def tail(self, device: str, plan: Plan, micro: MicroBatch) -> None:
        """Final norm and head, both ways."""

    def local(self, device: str, plan: Plan, micro: MicroBatch) -> None:
        """The whole model, both ways."""

    def up(self, device: str, message: Message, num_bytes: int) -> None:
        """A device has sent a message; bytes are those of all its packets."""

    def down(self, device: str, message: Message, num_bytes: int) -> None:
        """The coordinator has sent a message."""

    def received(self, device: str, message: Message) -> None:
        """A device has taken in a message."""

    # ---- modelled time, where there is one ----

    def take_arrivals(self, device: str) -> list[float]:
        """Return when what *device* has sent since the last call reaches the coordinator."""
        return []

    def now_s(self) -> float:
        """Return the seconds that have passed for the coordinator."""
        return 0.0

    def wait_until(self, now_s: float) -> None:
        """Let the coordinator do nothing until then."""


class SharedCompute(Executor):
    """The thread that computes for all devices of a process and their coordinator.

    Args:
        listener: Hears what is computed and what travels.
    """

    def __init__(self, listener: SimulationListener) -> None:
        self.listener = listener
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        """Frozen weights by the hash of their part: one copy for all devices that hold it."""
        self._thread = ThreadPoolExecutor(1, "simulated-compute")

    def submit(self, what: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Compute at once, so that nothing else happens meanwhile."""
        future = self._thread.submit(what, *args, **kwargs)
        wait([future])
        return future

    def run(self, what: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Compute at once; return the result."""
        return self.submit(what, *args, **kwargs).result()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the thread to the others."""

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown()


class _Turn:
    """Whose turn it is: the simulation's or the device's."""

    def __init__(self) -> None:
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def give(self) -> None:
        """Let the device run until it gives the turn back."""
        self._go.release()
        self._back.acquire()

    def await_go(self) -> None:
        """Wait, as the device, for the first turn."""
        self._go.acquire()

    def end(self) -> None:
        """Give the turn back for good."""
        self._back.release()

    def pause(self) -> None:
        """Give the turn back and wait for the next one."""
        self.end()
        self._go.acquire()


class _TurnLink:
    """A device's link; while it waits for a message, the others have their turn."""

    def __init__(
        self, link: MemoryLink, turn: _Turn, name: str, listener: SimulationListener
    ) -> None:
        self._link, self._turn, self._name, self._listener = link, turn, name, listener

    def send(self, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS) -> None:
        """Send a message; see `Link`."""
        before = self._link.stats().bytes_up
        self._link.send(message, tensors)
        self._listener.up(self._name, message, self._link.stats().bytes_up - before)

    def receive(self, deadline: Deadline) -> Envelope:
        """Return the next message; see `Link`."""
        try:
            envelope = self._link.receive(Deadline.after(0.0))
            self._listener.received(self._name, envelope.message)
            return envelope
        except ReceiveTimeout:
            if deadline.left_s():
                self._turn.pause()
            raise

    def set_limit(self, max_message_bytes: int) -> None:
        """Change the payload that one received message may have."""
        self._link.set_limit(max_message_bytes)

    def stats(self) -> LinkStats:
        """Return what the link has done so far."""
        return self._link.stats()

    def close(self, flush_s: float = 0.0) -> None:
        """Close this end."""
        self._link.close(flush_s)


class InstrumentedRuntime:
    """A runtime whose work is heard and computed in the thread of all devices."""

    def __init__(self, runtime: Runtime, device: str, plan: Plan, shared: SharedCompute) -> None:
        self._runtime, self._device, self._plan = runtime, device, plan
        self._listener, self._run = shared.listener, shared.run

    @property
    def state(self) -> TrainingState:
        """What is trained; whatever happens to it between steps takes no modelled time."""
        return self._runtime.state

    @property
    def has_local_tail(self) -> bool:
        """Whether the tail looks at single positions; see `Runtime`."""
        return self._run(lambda: self._runtime.has_local_tail)

    def forward(self, micro: MicroBatch, step: int, index: int) -> Array:
        """Run the device's blocks; see `Runtime`."""
        self._listener.forward(self._device, self._plan, micro)
        return self._run(self._runtime.forward, micro, step, index)

    def is_random(self, micro: MicroBatch) -> bool:
        """Return whether `forward` gives another h each time; this takes no modelled time."""
        return self._run(self._runtime.is_random, micro)

    def tail(
        self, final_hidden_BTD: Array, micro: MicroBatch, num_targets: int
    ) -> tuple[TailSums, Array]:
        """Return loss and dL/dh of the final hidden state; see `Runtime`."""
        self._listener.tail(self._device, self._plan, micro)
        return self._run(self._runtime.tail, final_hidden_BTD, micro, num_targets)

    def backward(self, grad_BTD: Array) -> None:
        """Continue the backward pass; see `Runtime`."""
        self._listener.backward(self._device, self._plan, grad_BTD)
        self._run(self._runtime.backward, grad_BTD)

    def local(self, micro: MicroBatch, num_targets: int, step: int, index: int) -> TailSums:
        """Run the whole model, both ways; see `Runtime`."""
        self._listener.local(self._device, self._plan, micro)
        return self._run(self._runtime.local, micro, num_targets, step, index)

    def step(self, step: int) -> None:
        """Update the adapters; see `Runtime`."""
        self._run(self._runtime.step, step)

    def forward_eval(self, micro: MicroBatch) -> Array:
        """Run the device's blocks without a graph; see `Runtime`."""
        return self._run(self._runtime.forward_eval, micro)

    def tail_eval(self, final_hidden_BTD: Array, micro: MicroBatch) -> TailSums:
        """Return the loss of the final hidden state; see `Runtime`."""
        return self._run(self._runtime.tail_eval, final_hidden_BTD, micro)

    def most_bytes(self) -> int:
        """Return an upper bound for the bytes of all factors; see `Runtime`."""
        return self._runtime.most_bytes()

    def memory_in_use(self) -> MemoryUse:
        """Return memory now, and the most since the process began."""
        return self._runtime.memory_in_use()


class _SharingSetup(RuntimeSetup):
    """A device's setup that shares frozen weights with the other devices of the process."""

    def __init__(
        self, config: ClientConfig, dataset: Dataset | None, name: str, shared: SharedCompute
    ) -> None:
        super().__init__(config, dataset)
        self._name, self._shared, self._device = name, shared, pick_device(config.device)

    def runtime(self, welcome: Welcome, assigned: PlanAssigned, ask: Ask) -> Runtime:
        """Build the device's slice; see `RuntimeSetup`."""
        for part in assigned.parts:  # before computing, which must not wait for messages
            self.tensors(part, welcome, ask)
        runtime = self._shared.run(super().runtime, welcome, assigned, ask)
        return InstrumentedRuntime(runtime, self._name, assigned.plan, self._shared)

    def return_freed(self) -> None:
        """Leave it to the process: for one device of many, a search of all would take longest."""

    def tensors(self, part: Part, welcome: Welcome, ask: Ask) -> Mapping[str, Any]:
        """Return the tensors of *part* as slices hold them, so that none makes a copy."""
        parts = self._shared.parts
        if part.sha256 not in parts:
            parts[part.sha256] = {
                name: value.to(self._device, torch.float32 if value.is_floating_point() else None)
                for name, value in super().tensors(part, welcome, ask).items()
            }
        return parts[part.sha256]


class SimulatedDevice:
    """A participant, its thread, and the coordinator's end of its link."""

    def __init__(
        self, name: str, config: ClientConfig, dataset: Dataset | None, shared: SharedCompute
    ) -> None:
        self.name = name
        ours, self.link = memory_pair()
        self.link.set_limit(FIRST_LIMIT_BYTES)
        self.error: BaseException | None = None
        self.is_over = False
        self.is_due = True
        """Whether something that it waits for may have happened."""
        self.leaves_after_step: int | None = None
        """Steps of the run after which it goes for good; None: it stays."""
        self._turn, self._stop = _Turn(), threading.Event()
        self._own_link = _TurnLink(ours, self._turn, name, shared.listener)
        self._config, self._dataset, self._shared = config, dataset, shared
        self._thread = threading.Thread(target=self._live, name=f"device-{name}", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Let the device do all that it can do without another message."""
        if not self.is_over:
            self.is_due = False
            self._turn.give()

    def close(self) -> None:
        """End the device, whatever it is doing."""
        self._stop.set()
        while not self.is_over:
            self._turn.give()
        self._thread.join()

    def _live(self) -> None:
        self._turn.await_go()
        try:
            if not self._stop.is_set():
                self._take_part()
        except BaseException as error:  # noqa: BLE001 - handed to whoever runs the simulation
            self.error = error
        finally:
            self.is_over = True
            self._turn.end()

    def _take_part(self) -> None:
        setup = _SharingSetup(self._config, self._dataset, self.name, self._shared)
        participant = Participant(self._own_link, self._config, setup, Callback(), self._stop)
        try:
            participant.join()
            participant.serve()
        except (RunEnded, Stopped):
            return
        except EdgeError as error:
            with suppress(EdgeError):
                participant.report(error)
            raise
        finally:
            participant.close()
            self._own_link.close()
