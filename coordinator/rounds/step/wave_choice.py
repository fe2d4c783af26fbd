"""Which of the micro-batches that wait are run together. Pure; what becomes of them is elsewhere.

Whoever is furthest behind in the step comes first, as the step ends when the last device does.
Others join whose rows are about as long, for a wave is padded to its longest row. Of each device
the micro-batches are taken in their order, as it waits for the answers in that order.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edge_sdk.protocol.plan import Place

# A row is not padded to more than this many times its length by those that it shares a wave with.
MOST_PADDING = 2


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
    queues: dict[str, deque[Candidate]] = {}
    for one in waiting:
        queues.setdefault(one.place[0], deque()).append(one)
    if not queues:
        return []
    first = max((queue[0] for queue in queues.values()), key=lambda one: one.left)
    queues[first.place[0]].popleft()  # of equals it is the earlier one
    wave = _Wave([first], first.rows, first.rows.longest)
    # Of those that are as near, whoever is further behind comes first, then whoever came first.
    heads = [
        (*_nearness(queue[0], first), number, queue)
        for number, queue in enumerate(queues.values())
        if queue
    ]
    heapq.heapify(heads)
    while heads and not fills(wave.rows, limits):
        _, _, number, queue = heads[0]
        if wave.takes(queue.popleft(), limits) and queue:
            heapq.heapreplace(heads, (*_nearness(queue[0], first), number, queue))
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
