"""Choose the ranks of adapters under a budget in bytes: a knapsack with several sizes per item.

An item is a weight, or several weights that share a cost: q, k and v keep one input. Greedy: from
the smallest ranks on, again and again the upgrade of the largest value per byte that fits. Upgrades
that a later, denser one makes pointless are skipped (the convex hull of value over bytes), which
makes the first upgrade that does not fit a bound for every choice. Where the greedy choice stays
more than 1 % below this bound (few items, coarse ranks) a dynamic program over rounded values takes
over. So the value is never more than 1 % below the best.

Pure: tables in, ranks out. It knows no model and no memory estimate.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from edge_sdk.errors import ConfigError

Utility = Literal["log", "sqrt", "linear"]
Table = Sequence["Choice"]
Weights = tuple[str, ...]
"""The weights of an item."""
# What the choice may lose against the best one, relative to it.
TOLERANCE = 0.01
_WORTH: dict[str, Callable[[float], float]] = {
    "log": lambda rank: math.log2(1 + rank),
    "sqrt": math.sqrt,
    "linear": float,
}


class Choice(NamedTuple):
    """Ranks that the weights of an item may have together."""

    ranks: tuple[int, ...]
    value: float
    num_bytes: float


def worth(utility: Utility, rank: int) -> float:
    """Return what a rank is worth to a weight of importance 1."""
    return _WORTH[utility](rank)


def rank_table(
    importance: Sequence[float],
    ranks: Sequence[Sequence[int]],
    bytes_of: Callable[[tuple[int, ...]], float],
    utility: Utility,
) -> tuple[Choice, ...]:
    """Return what the weights of an item may have, the cheapest first; nothing that is dominated.

    Args:
        importance: Of each weight; at least 0.
        ranks: Those that each weight may have; the smallest it has in any case.
        bytes_of: Memory that adapters of these ranks take together; never less for larger ranks.
        utility: What a rank is worth.
    """
    found = []
    for own in itertools.product(*(sorted(set(each)) for each in ranks)):
        value = math.fsum(i * worth(utility, r) for i, r in zip(importance, own, strict=True))
        found.append(Choice(own, value, bytes_of(own)))
    first, *rest = found
    kept = [first]
    for choice in sorted(rest, key=lambda c: (c.num_bytes, -c.value)):
        if choice.value > kept[-1].value:
            kept.append(choice)
    return tuple(kept)


def possible_ranks(
    rank_set: Iterable[int], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Return each weight's ranks: 0 and those of *rank_set* that it can have.

    Raises:
        ConfigError: no weight can have any.
    """
    wanted = sorted(rank_set)
    found = {name: [0, *(r for r in wanted if r <= min(shape))] for name, shape in shapes.items()}
    if shapes and all(len(ranks) == 1 for ranks in found.values()):
        largest = max(min(shape) for shape in shapes.values())
        raise ConfigError(
            f"planning.rank_set: no adapted weight can have a rank of {wanted}; "
            f"the largest that one can have is {largest}"
        )
    return found


def uniform_ranks(
    possible: Mapping[str, Sequence[int]],
    bytes_of: Callable[[dict[str, int]], float],
    budget_bytes: float,
) -> dict[str, int]:
    """Return the largest one rank on all weights that fits; where a weight cannot have it, less.

    Args:
        possible: Ranks of each weight, the smallest first.
        bytes_of: Memory of all adapters together.
        budget_bytes: What there is.

    Raises:
        ConfigError: not even the smallest ranks fit.
    """
    least = {name: ranks[0] for name, ranks in possible.items()}
    for rank in sorted({r for ranks in possible.values() for r in ranks}, reverse=True):
        taken = {
            n: max([r for r in ranks if r <= rank] or ranks[:1]) for n, ranks in possible.items()
        }
        if bytes_of(taken) <= budget_bytes:
            return taken
    _check(bytes_of(least), budget_bytes)
    return least


def choose_ranks(tables: Mapping[Weights, Table], budget_bytes: float) -> dict[str, int]:
    """Return the ranks of the largest total value within *budget_bytes*, to 1 %.

    Raises:
        ConfigError: not even the smallest ranks fit.
    """
    least = math.fsum(table[0].num_bytes for table in tables.values())
    _check(least, budget_bytes)
    gains = {item: _gains(table, budget_bytes - least) for item, table in tables.items()}
    taken, bound = _greedy(gains, budget_bytes - least)
    total = _value(taken)
    if total < (1.0 - TOLERANCE) * bound:
        better = _dynamic(gains, budget_bytes - least, bound)
        taken = better if _value(better) > total else taken
    return {
        name: rank
        for item, choice in taken.items()
        for name, rank in zip(item, choice.ranks, strict=True)
    }


def _check(least_bytes: float, budget_bytes: float) -> None:
    if least_bytes > budget_bytes:
        raise ConfigError(
            f"adapters of the smallest ranks asked for need {least_bytes / 2**20:,.2f} MiB, "
            f"{budget_bytes / 2**20:,.2f} MiB are left; lower r or lora.rank_pattern"
        )


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


def _dynamic(
    gains: Mapping[Weights, Sequence[Choice]], spare: float, bound: float
) -> dict[Weights, Choice]:
    """Find the choice of the largest value after rounding down: at most TOLERANCE is lost."""
    # The greedy choice or the single best upgrade is worth half of the bound at least (the greedy
    # value and the upgrade that did not fit make up the bound), so this unit is fine enough.
    unit = TOLERANCE * bound / 2 / len(gains)
    size = int(bound / unit) + 1
    least = np.full(size, np.inf)  # bytes of the cheapest choice of exactly that many units
    least[0] = 0.0
    picks = []
    for choices in gains.values():
        rows = np.full((len(choices), size), np.inf)
        for row, choice in zip(rows, choices, strict=True):
            units = min(int(choice.value / unit), size - 1)
            row[units:] = least[: size - units] + choice.num_bytes
        picks.append(rows.argmin(axis=0).astype(np.int32))
        least = rows.min(axis=0)
    units = int(np.flatnonzero(least <= spare)[-1])
    taken = {}
    for (name, choices), pick in zip(reversed(list(gains.items())), reversed(picks), strict=True):
        taken[name] = choices[pick[units]]
        units -= min(int(taken[name].value / unit), size - 1)
    return {name: taken[name] for name in gains}
