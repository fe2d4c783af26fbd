"""The choice of ranks as its definition reads: one upgrade after the other, for one budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from coordinator.planning import ranks
from coordinator.planning.ranks import TOLERANCE, Choice, Table, Weights


def plain_choice(tables: Mapping[Weights, Table], budget_bytes: float) -> dict[str, int]:
    """Return the ranks of the largest total value within *budget_bytes*, to 1 %."""
    least = math.fsum(table[0].num_bytes for table in tables.values())
    gains = {item: _gains(table, budget_bytes - least) for item, table in tables.items()}
    taken, bound = _greedy(gains, budget_bytes - least)
    total = _value(taken)
    if total < (1.0 - TOLERANCE) * bound:
        better = ranks.by_units(gains, budget_bytes - least, bound)
        taken = better if _value(better) > total else taken
    return {
        name: rank
        for item, choice in taken.items()
        for name, rank in zip(item, choice.ranks, strict=True)
    }


def _gains(table: Table, spare: float) -> list[Choice]:
    """Compare an item's choices with its first one, without those that could never fit."""
    _, value, num_bytes = table[0]
    gains = [Choice(c.ranks, c.value - value, c.num_bytes - num_bytes) for c in table]
    return [c for c in gains if c.num_bytes <= spare]


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices of an item whose upgrades fall in density one after the other."""
    kept = [choices[0]]
    for choice in choices[1:]:
        while kept and choice.num_bytes <= kept[-1].num_bytes and choice.value >= kept[-1].value:
            kept.pop()
        if kept and choice.value <= kept[-1].value:
            continue
        while len(kept) > 1 and _density(kept[-2], kept[-1]) <= _density(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _density(old: Choice, new: Choice) -> float:
    """Return the value per byte of an upgrade."""
    return (new.value - old.value) / max(new.num_bytes - old.num_bytes, 1e-300)


def _value(taken: Mapping[Weights, Choice]) -> float:
    return math.fsum(choice.value for choice in taken.values())


def _greedy(
    gains: Mapping[Weights, Sequence[Choice]], spare: float
) -> tuple[dict[Weights, Choice], float]:
    """Return a choice, and a value that no choice can exceed."""
    hulls = {name: _hull(choices) for name, choices in gains.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = spare - math.fsum(choice.num_bytes for choice in taken.values())
    bound = math.inf
    # In the model's order where densities are equal: the same input gives the same plan.
    heap = [
        (-_density(*hull[:2]), order, name, 1)
        for order, (name, hull) in enumerate(hulls.items())
        if len(hull) > 1
    ]
    heapq.heapify(heap)
    while heap:
        minus_density, order, name, level = heapq.heappop(heap)
        hull = hulls[name]
        cost = hull[level].num_bytes - taken[name].num_bytes
        if cost > left:
            if bound == math.inf:  # so far as a fraction of this upgrade would have gone
                bound = _value(taken) - minus_density * left
            continue
        taken[name], left = hull[level], left - cost
        if level + 1 < len(hull):
            density = _density(hull[level], hull[level + 1])
            heapq.heappush(heap, (-density, order, name, level + 1))
    taken = _fill(gains, taken, left)
    return taken, min(bound, _most(gains))


def _most(gains: Mapping[Weights, Sequence[Choice]]) -> float:
    return math.fsum(max(c.value for c in choices) for choices in gains.values())


def _fill(
    gains: Mapping[Weights, Sequence[Choice]], taken: dict[Weights, Choice], left: float
) -> dict[Weights, Choice]:
    """Spend what is left on whatever still fits, upgrades beside the hull included."""
    for name, choices in gains.items():
        fits = [c for c in choices if c.num_bytes - taken[name].num_bytes <= left]
        best = max(fits, key=lambda c: (c.value, -c.num_bytes))
        if best.value > taken[name].value:
            left -= best.num_bytes - taken[name].num_bytes
            taken[name] = best
    return taken
