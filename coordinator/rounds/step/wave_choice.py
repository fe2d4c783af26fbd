"""Which of the micro-batches that wait are run together. Pure; what becomes of them is elsewhere.

Whoever is furthest behind in the step comes first, as the step ends when the last device does.
Others join whose rows are about as long, for a wave is padded to its longest row. Of each device
the micro-batches are taken in their order, as it waits for the answers in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def choose(waiting: Sequence[Candidate], limits: Limits) -> list[Place]:
    """Return what is run together now; nothing only where nothing waits.

    Args:
        waiting: In the order of arrival, each device's micro-batches in that of its step.
        limits: What they may have together.
    """
    queues: dict[str, list[Candidate]] = {}
    for one in waiting:
        queues.setdefault(one.place[0], []).append(one)
    if not queues:
        return []
    heads = [queue[0] for queue in queues.values()]
    first = max(heads, key=lambda one: one.left)  # the earlier one of equals
    chosen, queue = [first], queues[first.place[0]]
    del queue[0]
    while heads := [queue[0] for queue in queues.values() if queue]:
        nearest = min(heads, key=lambda one: (_distance(one, first), -one.left))
        queue = queues[nearest.place[0]]
        if _fits([*chosen, nearest], limits):
            chosen.append(nearest)
            del queue[0]
        else:
            queue.clear()
    return [one.place for one in chosen]


def _distance(one: Candidate, other: Candidate) -> int:
    return abs(one.rows.longest - other.rows.longest)


def _fits(wave: Sequence[Candidate], limits: Limits) -> bool:
    rows = sum(one.rows.num for one in wave)
    lengths = [one.rows.longest for one in wave]
    is_similar = max(lengths) <= MOST_PADDING * min(lengths)
    return is_similar and rows <= limits.rows and rows * max(lengths) <= limits.tokens
