"""What has come of a step and waits, and what of it is run together. Pure.

Whoever is furthest behind in the step comes first, as the step ends when the last device does.
Others join whose rows are about as long, for a wave is padded to its longest row. Of each device
the micro-batches are taken in their order, as it waits for the answers in that order.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Mapping
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


class Limits(NamedTuple):
    """What a wave may have at most; a single micro-batch may always have more."""

    tokens: int
    """Padding included."""
    rows: int


def fills(rows: Rows, limits: Limits) -> bool:
    """Return whether beside a micro-batch of that size there is no room for another one."""
    num = rows.num + 1
    return num > limits.rows or num * rows.longest > limits.tokens


@dataclass(slots=True)
class _Wave:
    """What has been chosen, and its size."""

    places: list[Place]
    rows: Rows
    shortest: int
    """Tokens of the micro-batch whose longest row is the shortest."""

    def takes(self, place: Place, rows: Rows, limits: Limits) -> bool:
        """Add a micro-batch if it fits; return whether it does."""
        num, longest = self.rows.num + rows.num, max(self.rows.longest, rows.longest)
        shortest = min(self.shortest, rows.longest)
        is_similar = longest <= MOST_PADDING * shortest
        if not (is_similar and num <= limits.rows and num * longest <= limits.tokens):
            return False
        self.places.append(place)
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


Head = tuple[int, int, Place]
"""What a device has first: the micro-batches that it still needs, negative so that a heap has the
most of them first, the number of its arrival, and which it is."""


@dataclass
class BatchQueue:
    """Micro-batches that wait, each device's in the order of its step.

    Choosing a wave looks at what it takes and at one more of each length, not at all that waits.
    """

    places: dict[Place, Rows] = field(default_factory=dict)
    """In the order of arrival."""
    _micros: dict[str, dict[int, int]] = field(default_factory=dict)
    """Number of arrival of each micro-batch, by device, in their order."""
    _heads: list[Head] = field(default_factory=list)
    """Heap of what each device has first. Some do not wait now, some are there twice."""
    _heads_by_length: dict[int, list[Head]] = field(default_factory=dict)
    """The same, by the tokens of the longest row."""
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

    def choose(self, turns: Turns, limits: Limits) -> list[Place]:
        """Return what is run together now; nothing only where nobody can have a turn."""
        self._take_changes(turns)
        top = self._first_of(self._heads, turns)
        if top is None:
            return []
        first = self.places[top[2]]
        wave = _Wave([top[2]], first, first.longest)
        if not fills(first, limits):
            self._fill(wave, top[2], turns, limits)
        return wave.places

    def _fill(self, wave: _Wave, first: Place, turns: Turns, limits: Limits) -> None:
        """Add to a wave of *first* alone what is nearest to it in length, as long as it fits.

        Of those that are as near, whoever is further behind comes first, then whoever came first.
        """
        length = wave.rows.longest
        nearest: list[tuple[int, int, int, Place]] = []
        looked_at: dict[Place, Head] = {}

        def offer(longest: int) -> None:
            heap = self._heads_by_length[longest]
            head = self._first_of(heap, turns)
            while head is not None and head[2] in looked_at:  # it is there twice
                heapq.heappop(heap)
                head = self._first_of(heap, turns)
            if head is not None:
                looked_at[head[2]] = heapq.heappop(heap)
                heapq.heappush(nearest, (abs(longest - length), *head))

        for longest in self._heads_by_length:
            offer(longest)
        while nearest and not fills(wave.rows, limits):
            _, left, number, place = heapq.heappop(nearest)
            rows, own = self.places[place], self._micros[place[0]]
            if own[place[1]] == number:
                offer(rows.longest)
            if place == first or wave.takes(place, rows, limits):
                following = _after(own, place[1])
                if following is not None and not turns.is_single(place[0]):
                    after = place[0], following
                    gap = abs(self.places[after].longest - length)
                    left += following - place[1]
                    heapq.heappush(nearest, (gap, left, number, after))
        for place, head in looked_at.items():
            heapq.heappush(self._heads_by_length[self.places[place].longest], head)

    def _take_changes(self, turns: Turns) -> None:
        for device in self._changed:
            if own := self._micros.get(device):
                micro, number = next(iter(own.items()))
                place = device, micro
                head = (micro - turns.members[device].num_micro, number, place)
                heapq.heappush(self._heads, head)
                same = self._heads_by_length.setdefault(self.places[place].longest, [])
                heapq.heappush(same, head)
        self._changed.clear()

    def _first_of(self, heap: list[Head], turns: Turns) -> Head | None:
        """Return the first of a heap that can have its turn, and drop those before it."""
        while heap:
            _, number, (device, micro) = heap[0]
            own = self._micros.get(device)
            is_first = own is not None and next(iter(own.items())) == (micro, number)
            if is_first and not turns.is_held(device):
                return heap[0]
            heapq.heappop(heap)
        return None


def _after(own: Iterable[int], micro: int) -> int | None:
    """Return which micro-batch of a device waits behind another one."""
    following = iter(own)
    for one in following:
        if one == micro:
            return next(following, None)
    return None
