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

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Utility = Literal["log", "sqrt", "linear"]
Table = Sequence["Choice"]
Weights = tuple[str, ...]
"""The weights of an item."""
# What the choice may lose against the best one, relative to it.
TOLERANCE = 0.01
# Orders of upgrades that are remembered: budgets that are not small have one in common.
MOST_PATHS = 64
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
    return UniformRanks(possible, bytes_of).choose(budget_bytes)


class UniformRanks:
    """One rank on all weights, chosen under one budget after another."""

    def __init__(
        self, possible: Mapping[str, Sequence[int]], bytes_of: Callable[[dict[str, int]], float]
    ) -> None:
        """Take what there is to choose from; see `uniform_ranks`."""
        self._possible, self._bytes_of = possible, bytes_of
        self._ranks = sorted({r for ranks in possible.values() for r in ranks}, reverse=True)
        self._known: dict[int, tuple[dict[str, int], float]] = {}

    def choose(self, budget_bytes: float) -> dict[str, int]:
        """Return the largest one rank that fits; see `uniform_ranks`."""
        for rank in self._ranks:
            taken, num_bytes = self._priced(rank)
            if num_bytes <= budget_bytes:
                return dict(taken)
        least = {name: ranks[0] for name, ranks in self._possible.items()}
        _check(self._bytes_of(least), budget_bytes)
        return least

    def _priced(self, rank: int) -> tuple[dict[str, int], float]:
        if rank not in self._known:
            taken = {
                name: max([r for r in ranks if r <= rank] or ranks[:1])
                for name, ranks in self._possible.items()
            }
            self._known[rank] = taken, self._bytes_of(taken)
        return self._known[rank]


def choose_ranks(tables: Mapping[Weights, Table], budget_bytes: float) -> dict[str, int]:
    """Return the ranks of the largest total value within *budget_bytes*, to 1 %.

    Raises:
        ConfigError: not even the smallest ranks fit.
    """
    return Knapsack(tables).choose(budget_bytes)


def _check(least_bytes: float, budget_bytes: float) -> None:
    if least_bytes > budget_bytes:
        raise ConfigError(
            f"adapters of the smallest ranks asked for need {least_bytes / 2**20:,.2f} MiB, "
            f"{budget_bytes / 2**20:,.2f} MiB are left; lower r or lora.rank_pattern"
        )


class Knapsack:
    """Items whose ranks are chosen under one budget after another.

    What all budgets have in common is found once: a fleet has as many budgets as devices.
    """

    def __init__(self, tables: Mapping[Weights, Table]) -> None:
        """Take what there is to choose from.

        Args:
            tables: By item, as `rank_table` makes them: bytes and value rise from row to row.
        """
        self._least = math.fsum(table[0].num_bytes for table in tables.values())
        self._items = [_Item(names, table) for names, table in tables.items()]
        self._known: dict[tuple[int, ...], _Paths] = {}
        """Upgrades by the rows that fit; nearly all budgets have room for any one row."""

    def choose(self, budget_bytes: float) -> dict[str, int]:
        """Return the ranks of the largest total value within a budget, to 1 %.

        Raises:
            ConfigError: not even the smallest ranks fit.
        """
        _check(self._least, budget_bytes)
        if not self._items:
            return {}
        spare = budget_bytes - self._least
        stops = tuple([bisect_right(item.num_bytes, spare) for item in self._items])
        taken, bound = self._greedy(stops, spare)
        total = math.fsum(i.gains[n].value for i, n in zip(self._items, taken, strict=True))
        found = [i.gains[n] for i, n in zip(self._items, taken, strict=True)]
        if total < (1.0 - TOLERANCE) * bound:
            gains = {i.names: i.gains[:n] for i, n in zip(self._items, stops, strict=True)}
            better = by_units(gains, spare, bound)
            if math.fsum(choice.value for choice in better.values()) > total:
                found = list(better.values())
        return {
            name: rank
            for item, choice in zip(self._items, found, strict=True)
            for name, rank in zip(item.names, choice.ranks, strict=True)
        }

    def _greedy(self, stops: tuple[int, ...], spare: float) -> tuple[list[int], float]:
        """Return a choice for each item, by its row, and a value that no choice can exceed."""
        items, paths = self._items, self._paths(stops)
        taken, left, bound = list(paths.begins), spare, math.inf
        # As many as fit one after the other; then whatever still fits of those that follow.
        lefts = np.subtract.accumulate(np.concatenate(([left], paths.costs)))[1:]
        count = int(np.argmax(lefts < 0.0)) if (lefts < 0.0).any() else len(lefts)
        for order, row in zip(
            paths.orders[:count].tolist(), paths.rows[:count].tolist(), strict=True
        ):
            taken[order] = row
        left = float(lefts[count - 1]) if count else left
        if count < len(lefts):  # so far as a fraction of this upgrade would have gone
            so_far = math.fsum(item.gains[n].value for item, n in zip(items, taken, strict=True))
            bound = so_far + float(paths.densities[count]) * left
            left = _squeeze(paths, count, taken, left)
        self._fill(stops, taken, left)
        return taken, min(bound, paths.most)

    def _paths(self, stops: tuple[int, ...]) -> _Paths:
        """Return the upgrades of all items among their first rows, the densest first."""
        if stops not in self._known:
            if len(self._known) >= MOST_PATHS:
                self._known.clear()
            self._known[stops] = self._find_paths(stops)
        return self._known[stops]

    def _find_paths(self, stops: Sequence[int]) -> _Paths:
        """Return what `_paths` does, found anew.

        In the model's order where densities are equal: the same input gives the same plan.
        """
        own = [item.path(stop) for item, stop in zip(self._items, stops, strict=True)]
        lengths = [len(path.rows) for path in own]
        orders = np.repeat(np.arange(len(own)), lengths)
        densities = np.concatenate([path.densities for path in own])
        ranked = np.argsort(-densities, kind="stable")
        rows = np.concatenate([path.rows for path in own])[ranked]
        costs = np.concatenate([path.costs for path in own])[ranked]
        begins = [path.begin for path in own]
        most = math.fsum(
            item.gains[stop - 1].value for item, stop in zip(self._items, stops, strict=True)
        )
        return _Paths(begins, orders[ranked], rows, costs, densities[ranked], most)

    def _fill(self, stops: Sequence[int], taken: list[int], left: float) -> None:
        """Spend what is left on whatever still fits, upgrades beside the hull included."""
        for order, item in enumerate(self._items):
            now, stop, num_bytes = taken[order], stops[order], item.num_bytes
            row = now
            while row + 1 < stop and num_bytes[row + 1] - num_bytes[now] <= left:
                row += 1
            if row > now:
                left -= num_bytes[row] - num_bytes[now]
                taken[order] = row


class _Path(NamedTuple):
    """The upgrades of an item one after the other, their density falling."""

    begin: int
    """Row that it has without any."""
    rows: IntArray
    """Row that each leads to."""
    costs: FloatArray
    """Its bytes beside those of the one before."""
    densities: FloatArray
    """Value per byte."""


class _Paths(NamedTuple):
    """Upgrades of all items, the densest first."""

    begins: list[int]
    """Row of each item without any."""
    orders: IntArray
    """Number of the item."""
    rows: IntArray
    costs: FloatArray
    densities: FloatArray
    most: float
    """Value of all of them together."""


class _Item:
    """One item, and the upgrades that its rows allow under whatever budget."""

    def __init__(self, names: Weights, table: Table) -> None:
        self.names = names
        _, value, num_bytes = table[0]
        rows = [table[0]]
        for choice in table[1:]:
            if choice.value > rows[-1].value:  # else it is worth nothing more
                rows.append(choice)
        self.gains = [Choice(c.ranks, c.value - value, c.num_bytes - num_bytes) for c in rows]
        """Beside the first row."""
        self.num_bytes = [choice.num_bytes for choice in self.gains]
        self._before = _hulls(self.gains)
        self._known: dict[int, _Path] = {}

    def path(self, stop: int) -> _Path:
        """Return the upgrades among the first *stop* rows."""
        if stop not in self._known:
            self._known[stop] = self._path(stop)
        return self._known[stop]

    def _path(self, stop: int) -> _Path:
        hull = [stop - 1]
        while self._before[hull[-1]] >= 0:
            hull.append(self._before[hull[-1]])
        hull.reverse()
        ups = [(self.gains[a], self.gains[b]) for a, b in zip(hull, hull[1:], strict=False)]
        return _Path(
            hull[0],
            np.array(hull[1:], dtype=np.int64),
            np.array([new.num_bytes - old.num_bytes for old, new in ups], dtype=np.float64),
            np.array([_density(old, new) for old, new in ups], dtype=np.float64),
        )


def _hulls(choices: Sequence[Choice]) -> list[int]:
    """Return the row before each row in the convex hull of value over bytes that ends with it.

    So the upgrades of an item whose last rows do not fit are known as well; -1: there is none.
    """
    kept: list[int] = []
    before = []
    for row, choice in enumerate(choices):
        while kept and choice.num_bytes <= choices[kept[-1]].num_bytes:
            kept.pop()
        while len(kept) > 1 and _density(choices[kept[-2]], choices[kept[-1]]) <= _density(
            choices[kept[-1]], choice
        ):
            kept.pop()
        before.append(kept[-1] if kept else -1)
        kept.append(row)
    return before


def _squeeze(paths: _Paths, first: int, taken: list[int], left: float) -> float:
    """Take what still fits of the upgrades from *first* on; return the bytes that are left then.

    An item of which one does not fit gets none of those that follow.
    """
    costs = paths.costs[first:]
    if not (costs <= left).any():
        return left
    full: set[int] = set()
    orders, rows = paths.orders[first:].tolist(), paths.rows[first:].tolist()
    for order, row, cost in zip(orders, rows, costs.tolist(), strict=True):
        if order in full:
            continue
        if cost > left:
            full.add(order)
        else:
            taken[order], left = row, left - cost
    return left


def _density(old: Choice, new: Choice) -> float:
    """Return the value per byte of an upgrade."""
    return (new.value - old.value) / max(new.num_bytes - old.num_bytes, 1e-300)


def by_units(
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
