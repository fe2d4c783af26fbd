"""What has come of a step and waits, and what of it is run together. Pure.

Whoever is furthest behind in the step comes first, as the step ends when the last device does.
Others join whose rows are about as long, for a wave is padded to its longest row. Of each device
the micro-batches are taken in their order, as it waits for the answers in that order.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from edge_sdk.protocol.plan import Place

# A row is not padded to more than this many times its length by those that it shares a wave with.
MOST_PADDING = 2


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


class Rows(NamedTuple):
    """Size of a micro-batch."""

    num: int
    longest: int
    """Tokens of its longest row, to which the others are padded."""


class Candidate(NamedTuple):
    """A micro-batch that can be run now."""

    place: Place
    rows: Rows
    left: int
    """Micro-batches of its device that the step still needs, this one included."""


class Limits(NamedTuple):
    """What a wave may have at most; a single micro-batch may always have more."""

    tokens: int
    """Padding included."""
    rows: int


def fills(rows: Rows, limits: Limits) -> bool:
    """Return whether beside a micro-batch of that size there is no room for another one."""
    num = rows.num + 1
    return num > limits.rows or num * rows.longest > limits.tokens


def choose(waiting: Sequence[Candidate], limits: Limits) -> list[Place]:
    """Return what is run together now; nothing only where nothing waits.

    Args:
        waiting: In the order of arrival, each device's micro-batches in that of its step.
        limits: What they may have together.
    """
    queues: dict[str, list[Candidate]] = {}
    for one in waiting:
        own = queues.get(one.place[0])
        if own is None:
            queues[one.place[0]] = [one]
        else:
            own.append(one)
    if not queues:
        return []
    first = max((queue[0] for queue in queues.values()), key=lambda one: one.left)
    wave = _Wave([first], first.rows, first.rows.longest)
    # Of those that are as near, whoever is further behind comes first, then whoever came first.
    heads = [
        (*_nearness(queue[begin], first), number, begin, queue)
        for number, queue in enumerate(queues.values())
        if (begin := int(queue[0] is first)) < len(queue)  # of equals it is the earlier one
    ]
    heapq.heapify(heads)
    while heads and not fills(wave.rows, limits):
        _, _, number, at, queue = heads[0]
        following = at + 1
        if wave.takes(queue[at], limits) and following < len(queue):
            head = (*_nearness(queue[following], first), number, following, queue)
            heapq.heapreplace(heads, head)
        else:
            heapq.heappop(heads)
    return wave.places


def _nearness(one: Candidate, first: Candidate) -> tuple[int, int]:
    return abs(one.rows.longest - first.rows.longest), -one.left


@dataclass(slots=True)
class _Wave:
    """What has been chosen, and its size."""

    chosen: list[Candidate]
    rows: Rows
    shortest: int
    """Tokens of the micro-batch whose longest row is the shortest."""

    @property
    def places(self) -> list[Place]:
        """What has been chosen, in that order."""
        return [one.place for one in self.chosen]

    def takes(self, one: Candidate, limits: Limits) -> bool:
        """Add *one* if it fits; return whether it does."""
        num, longest = self.rows.num + one.rows.num, max(self.rows.longest, one.rows.longest)
        shortest = min(self.shortest, one.rows.longest)
        is_similar = longest <= MOST_PADDING * shortest
        if not (is_similar and num <= limits.rows and num * longest <= limits.tokens):
            return False
        self.chosen.append(one)
        self.rows, self.shortest = Rows(num, longest), shortest
        return True


class Turns(NamedTuple):
    """Who may have a turn."""

    members: Members
    away: Container[str]
    """Devices of which something is away."""
    labels_on_device: bool

    def is_single(self, device: str) -> bool:
        """Return whether a device has one micro-batch under way at a time."""
        return self.labels_on_device and not self.members[device].looks_ahead

    def is_held(self, device: str) -> bool:
        """Return whether a device has to wait for what it has away."""
        return device in self.away and self.is_single(device)


@dataclass
class BatchQueue:
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
        members, has_singles = turns.members, turns.labels_on_device
        for place, rows in self.places.items():
            device, micro = place
            member = members[device]
            if has_singles and not member.looks_ahead:
                if device in singles or device in turns.away:
                    continue
                singles.add(device)
            found.append(Candidate(place, rows, member.num_micro - micro))
        return found
