"""What has come of a step and waits for its turn, and whose turn is next. Pure.

As `away.py`, it never goes through all devices to answer who is first.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from coordinator.rounds.step.away import Away
from coordinator.rounds.step.wave_choice import Candidate, Rows
from edge_sdk.protocol.plan import Place


class InStep(Protocol):
    """A member of the round, as far as its steps go."""

    @property
    def batch_size(self) -> int:
        """Sequences of a step."""

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step."""

    @property
    def is_local(self) -> bool:
        """Whether it takes no part in waves."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it takes a final hidden state before the gradient of the micro-batch before."""


Members = Mapping[str, InStep]


class Turns(NamedTuple):
    """Who may have a turn."""

    members: Members
    away: Away
    labels_on_device: bool

    def is_single(self, device: str) -> bool:
        """Return whether a device has one micro-batch under way at a time."""
        return self.labels_on_device and not self.members[device].looks_ahead

    def is_held(self, device: str) -> bool:
        """Return whether a device has to wait for what it has away."""
        return self.away.has(device) and self.is_single(device)


@dataclass
class Arrivals:
    """Micro-batches that wait, each device's in the order of its step."""

    places: dict[Place, Rows] = field(default_factory=dict)
    """In the order of arrival."""
    _micros: dict[str, dict[int, int]] = field(default_factory=dict)
    """Number of arrival of each micro-batch, by device, in their order."""
    _heads: list[tuple[int, int, Place]] = field(default_factory=list)
    """Heap of what each device has first: furthest behind, then earliest. Some do not wait now."""
    _changed: dict[str, None] = field(default_factory=dict)
    """Devices of which something else is first, or may have its turn again."""
    _count: int = 0

    def add(self, place: Place, rows: Rows) -> None:
        """Let a micro-batch wait."""
        self._count += 1
        self.places[place] = rows
        self._micros.setdefault(place[0], {})[place[1]] = self._count
        self._changed[place[0]] = None

    def remove(self, place: Place) -> None:
        """Let a micro-batch wait no more."""
        device, micro = place
        del self.places[place]
        own = self._micros[device]
        del own[micro]
        if not own:
            del self._micros[device]
        self._changed[device] = None

    def look_again(self, device: str) -> None:
        """Note that a device may have its turn from now on."""
        self._changed[device] = None

    def first(self, turns: Turns) -> Candidate | None:
        """Return who has the next turn; None where nobody can have one."""
        for device in self._changed:
            if own := self._micros.get(device):
                micro, number = next(iter(own.items()))
                left = turns.members[device].num_micro - micro
                heapq.heappush(self._heads, (-left, number, (device, micro)))
        self._changed.clear()
        while self._heads:
            left, _, place = self._heads[0]
            device, micro = place
            is_first = next(iter(self._micros.get(device, ())), None) == micro
            if is_first and not turns.is_held(device):
                return Candidate(place, self.places[place], -left)
            heapq.heappop(self._heads)
        return None

    def all(self, turns: Turns) -> list[Candidate]:
        """Return all that can have their turn now, in the order of arrival."""
        found, singles = list[Candidate](), set[str]()
        for place, rows in self.places.items():
            device, micro = place
            if turns.is_single(device):
                if device in singles or turns.away.has(device):
                    continue
                singles.add(device)
            found.append(Candidate(place, rows, turns.members[device].num_micro - micro))
        return found
