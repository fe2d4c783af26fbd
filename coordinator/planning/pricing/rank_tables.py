"""What ranks are worth and cost, on a device or on the coordinator: what `ranks.py` chooses from.

It knows no budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from coordinator.aggregation.rules import SERVER
from coordinator.planning.costs import Load, block_adapters_bytes
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.ranks import Choice, Weights, rank_table

# Combinations of the ranks of weights that read the same input: more are not listed.
MOST_COMBINATIONS = 1000


def rank_tables(
    problem: PlanningProblem, device: str, loads: Mapping[str, Load]
) -> dict[Weights, tuple[Choice, ...]]:
    """Return what ranks are worth and cost, on a device or on `SERVER`.

    Args:
        problem: The situation.
        device: Whose ranks.
        loads: What passes through each weight; only these get a table. Weights of one block have
            one load.
    """
    blocks: dict[int, Load] = {}
    for name, load in loads.items():
        blocks[problem.place(name)[0]] = load
    tables: dict[Weights, tuple[Choice, ...]] = {}
    for block, load in blocks.items():
        tables |= _tables_of_block(problem, device, block, load)
    return tables


def _tables_of_block(
    problem: PlanningProblem, device: str, block: int, load: Load
) -> dict[Weights, tuple[Choice, ...]]:
    def make() -> dict[Weights, tuple[Choice, ...]]:
        found = {}
        for item in _items(problem, device, problem.weights(block, block + 1)):
            ranks = [problem.ranks(device, name) for name in item]
            insides = tuple(problem.place(name)[1] for name in item)
            found[item] = rank_table(
                [problem.importance_of(name) for name in item],
                ranks,
                _prices(problem, insides, ranks, load).__getitem__,
                problem.config.planning.utility,
            )
        return found

    if device == SERVER:  # its load is that of all devices: it is another one with every device
        return make()
    return problem.tables.of((problem.kind(device), block, load), make)


def _prices(
    problem: PlanningProblem, insides: tuple[str, ...], ranks: Sequence[Sequence[int]], load: Load
) -> dict[tuple[int, ...], float]:
    """Return what adapters of all possible ranks add to a block, equal in all blocks."""

    def make() -> dict[tuple[int, ...], float]:
        return {
            own: block_adapters_bytes(problem, tuple(zip(insides, own, strict=True)), load)
            for own in itertools.product(*ranks)
        }

    return problem.known.of(("prices", insides, tuple(map(tuple, ranks)), load), make)


def _items(problem: PlanningProblem, device: str, weights: Iterable[str]) -> list[Weights]:
    """Group weights that are chosen together: those of a block that read the same input."""
    inputs: dict[tuple[int, int | str], list[str]] = {}
    for name in weights:
        block, inside = problem.place(name)
        source = problem.input_ids.get(inside, -1)
        inputs.setdefault((block, source if source >= 0 else inside), []).append(name)
    found: list[Weights] = []
    for names in inputs.values():
        size = math.prod(len(problem.ranks(device, name)) for name in names)
        # Too many combinations: each weight is charged for the input as if no other kept it.
        found += [tuple(names)] if size <= MOST_COMBINATIONS else [(name,) for name in names]
    return found
