"""Micro-batches that devices want to have evaluated: when it is due, once each, and in turn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from coordinator.engine.interface import Job
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol.messages import Activation

Due = tuple[Activation, Job]
# A device sends the next one when it has the result of the one before.
MOST_WAITING = 2


@dataclass
class Evaluations:
    """Who evaluates now, and what of it has yet to be computed."""

    _next_micro: dict[str, int] = field(default_factory=dict)
    """Of each device that evaluates."""
    _waiting: dict[str, deque[Due]] = field(default_factory=dict)
    """In the order in which devices have their turn."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def begin(self, device: str) -> None:
        """Note that a device was told to evaluate."""
        self.forget(device)
        self._next_micro[device] = 0

    def end(self, device: str) -> None:
        """Note that a device has reported what it found."""
        self._next_micro.pop(device, None)

    def forget(self, device: str) -> None:
        """Drop what a device has sent; it has to be told again."""
        self._next_micro.pop(device, None)
        self._waiting.pop(device, None)

    def is_due(self, device: str) -> bool:
        """Return whether a device evaluates now."""
        return device in self._next_micro

    def add(self, message: Activation, job: Job) -> None:
        """Let a micro-batch of a device that evaluates wait for its turn.

        Raises:
            RemoteProtocolError: it has come before, or too many of its device wait.
        """
        device, due = job.device, self._next_micro[job.device]
        if message.micro != due:
            raise RemoteProtocolError(f"evaluation of micro-batch {message.micro}, due is {due}")
        own = self._waiting.setdefault(device, deque())
        if len(own) >= MOST_WAITING:
            raise RemoteProtocolError(f"more than {MOST_WAITING} micro-batches to evaluate at once")
        self._next_micro[device] = due + 1
        own.append((message, job))

    def take(self) -> list[Due]:
        """Return the next micro-batch of each device."""
        found = [own.popleft() for own in self._waiting.values()]
        self._waiting = {device: own for device, own in self._waiting.items() if own}
        return found
