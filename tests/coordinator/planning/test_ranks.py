"""Ranks under a budget: within 1 % of the best choice there is, and quickly."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.ranks import (
    TOLERANCE,
    Choice,
    Knapsack,
    Utility,
    choose_ranks,
    possible_ranks,
    rank_table,
    uniform_ranks,
)
from edge_sdk.errors import ConfigError
from tests.coordinator.planning.plain_ranks import plain_choice

Tables = dict[tuple[str, ...], tuple[Choice, ...]]


@st.composite
def anything(draw: st.DrawFn) -> Tables:
    """Up to five weights with any values and costs that grow with the rank."""
    tables = {}
    for index in range(draw(st.integers(1, 5))):
        steps = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
        gains = draw(st.lists(st.floats(0, 10), min_size=len(steps), max_size=len(steps)))
        costs, values = itertools.accumulate(steps), itertools.accumulate(gains)
        tables[(f"w{index}",)] = tuple(
            Choice((rank,), value, float(cost))
            for rank, (cost, value) in enumerate(zip(costs, values, strict=True))
        )
    return tables


@st.composite
def adapters(draw: st.DrawFn) -> Tables:
    """Up to four items as a plan has them: a price per rank, and one for all once any is there."""
    utility = draw(st.sampled_from(get_args(Utility)))
    tables = {}
    for index in range(draw(st.integers(1, 4))):
        size, kept = draw(st.integers(1, 40)), draw(st.integers(0, 100))
        members = draw(st.integers(1, 2))
        ranks = [
            draw(st.sampled_from([(0, 2, 4, 8, 16), (0, 1, 8), (0, 3), (4,), (0,)]))
            for _ in range(members)
        ]
        tables[tuple(f"w{index}.{m}" for m in range(members))] = rank_table(
            [draw(st.floats(0, 10)) for _ in range(members)],
            ranks,
            lambda own, s=size, k=kept: k * any(own) + s * sum(own),
            utility,
        )
    return tables


def alone(importance: float, ranks: Sequence[int], utility: Utility) -> tuple[Choice, ...]:
    """The table of a weight that shares nothing; a rank costs one byte."""
    return rank_table([importance], [ranks], lambda own: float(sum(own)), utility)


def taken(tables: Tables, ranks: dict[str, int]) -> list[Choice]:
    """The choices that make up *ranks*."""
    return [
        next(c for c in table if c.ranks == tuple(ranks[name] for name in item))
        for item, table in tables.items()
    ]


def value(tables: Tables, ranks: dict[str, int]) -> float:
    """What a choice is worth."""
    return sum(choice.value for choice in taken(tables, ranks))


def cost(tables: Tables, ranks: dict[str, int]) -> float:
    """What a choice takes."""
    return math.fsum(choice.num_bytes for choice in taken(tables, ranks))


def best_value(tables: Tables, budget: float) -> float:
    """The largest value of all choices that fit."""
    return max(
        sum(c.value for c in choice)
        for choice in itertools.product(*tables.values())
        if math.fsum(c.num_bytes for c in choice) <= budget
    )


@given(st.one_of(anything(), adapters()), st.floats(0, 1))
def test_no_choice_is_more_than_a_percent_better(tables: Tables, share: float) -> None:
    """Against every combination, from a budget for nothing to one for everything."""
    least = math.fsum(table[0].num_bytes for table in tables.values())
    most = math.fsum(table[-1].num_bytes for table in tables.values())
    budget = least + share * (most - least)

    ranks = choose_ranks(tables, budget)

    assert cost(tables, ranks) <= budget + 1e-9 * most
    base = sum(table[0].value for table in tables.values())
    best = best_value(tables, budget) - base
    assert value(tables, ranks) - base >= (1 - TOLERANCE) * best - 1e-9


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, unique=True), min_size=1, max_size=4),
    st.integers(0, 10),
    st.floats(0, 1),
)
def test_one_rank_for_all_is_the_largest_that_fits(
    ranks: list[list[int]], kept: int, share: float
) -> None:
    """The next rank on every weight would take more than there is."""
    possible = {f"w{i}": sorted(own) for i, own in enumerate(ranks)}

    def bytes_of(own: dict[str, int]) -> float:
        return kept * any(own.values()) + sum(own.values())

    levels = [
        {n: max([r for r in own if r <= level], default=own[0]) for n, own in possible.items()}
        for level in range(7)
    ]
    budget = bytes_of(levels[0]) + share * bytes_of(levels[-1])

    found = uniform_ranks(possible, bytes_of, budget)

    assert found == [level for level in levels if bytes_of(level) <= budget][-1]


def test_dominated_combinations_are_dropped() -> None:
    """What costs no less and is worth no more than another can be no part of a best choice."""
    full = list(itertools.product((0, 2, 4), repeat=2))

    table = rank_table([3.0, 1.0], [(0, 2, 4)] * 2, lambda own: 9 * any(own) + sum(own), "log")

    kept = [choice.ranks for choice in table]
    assert kept[0] == (0, 0)
    assert kept[-1] == (4, 4)
    assert (0, 4) not in kept
    for ranks in full:
        own = 3.0 * math.log2(1 + ranks[0]) + math.log2(1 + ranks[1])
        bytes_ = 9 * any(ranks) + sum(ranks)
        assert any(c.value >= own and c.num_bytes <= bytes_ for c in table)


def test_pure_greedy_would_miss_this_one() -> None:
    """The densest upgrade blocks a larger one; the program over rounded values sees it."""
    tables: Tables = {
        ("small",): (Choice((0,), 0.0, 0.0), Choice((2,), 1.1, 1.0)),
        ("large",): (Choice((0,), 0.0, 0.0), Choice((2,), 10.0, 10.0)),
    }

    assert choose_ranks(tables, 10.0) == {"small": 0, "large": 2}
    assert choose_ranks(tables, 11.0) == {"small": 2, "large": 2}
    assert choose_ranks(tables, 9.9) == {"small": 2, "large": 0}


def test_utility_decides_whether_ranks_spread() -> None:
    """With log the second weight gets something; with linear the important one takes all."""
    for utility, expected in (("log", {"q": 8, "v": 8}), ("linear", {"q": 16, "v": 0})):
        tables = {
            (name,): alone(importance, (0, 2, 4, 8, 16), utility)  # type: ignore[arg-type]
            for name, importance in (("q", 1.2), ("v", 1.0))
        }
        assert choose_ranks(tables, 16.0) == expected


def test_a_weight_without_importance_gets_nothing() -> None:
    """Bytes that bring nothing stay free."""
    tables = {("q",): alone(1.0, (0, 2, 4), "log"), ("v",): alone(0.0, (0, 2, 4), "log")}

    assert choose_ranks(tables, 1e9) == {"q": 4, "v": 0}


def test_a_set_rank_is_kept() -> None:
    """A weight with one choice has it, and pays for it; what it needs must be there."""
    possible = {"q": [8], "v": [0, 2, 4]}
    tables = {(name,): alone(1.0, ranks, "log") for name, ranks in possible.items()}

    def bytes_of(own: dict[str, int]) -> float:
        return float(sum(own.values()))

    assert choose_ranks(tables, 10.0) == {"q": 8, "v": 2}
    assert uniform_ranks(possible, bytes_of, 10.0) == {"q": 8, "v": 2}
    with pytest.raises(ConfigError, match="smallest ranks asked for need"):
        choose_ranks(tables, 7.0)
    with pytest.raises(ConfigError, match="smallest ranks asked for need"):
        uniform_ranks(possible, bytes_of, 7.0)


def test_ranks_that_a_weight_cannot_have_are_dropped() -> None:
    """A rank is at most the smaller side of its weight; a set of none is refused by name."""
    shapes = {"q": (64, 64), "k": (8, 64)}

    assert possible_ranks((16, 2, 8), shapes) == {"q": [0, 2, 8, 16], "k": [0, 2, 8]}
    with pytest.raises(ConfigError, match=r"planning.rank_set: .* rank of \[65, 128\]; .* is 64"):
        possible_ranks((128, 65), shapes)


def test_a_model_of_7b_shapes_fills_its_budget() -> None:
    """224 weights in items of one to three: few bytes are left, one rank for all is beaten."""
    kinds = [((4096, 4096),) * 3, ((4096, 4096),), ((11008, 4096),) * 2, ((4096, 11008),)]
    tables, importance = {}, {}
    for block, (kind, shapes) in itertools.product(range(32), enumerate(kinds)):
        item = tuple(f"{block}.{kind}.{i}" for i in range(len(shapes)))
        importance[item] = [1.0 + (block * 7 + kind + i) % 13 for i in range(len(shapes))]
        tables[item] = rank_table(
            importance[item],
            [(0, 2, 4, 8, 16)] * len(shapes),
            lambda own, s=shapes: 16.0 * sum(r * sum(x) for r, x in zip(own, s, strict=True)),
            "log",
        )
    for level in (2, 4, 8):
        budget = 32 * 16.0 * level * sum(sum(shape) for shapes in kinds for shape in shapes)
        uniform = sum(map(sum, importance.values())) * math.log2(1 + level)

        ranks = choose_ranks(tables, budget)

        assert 0.99 * budget < cost(tables, ranks) <= budget
        assert value(tables, ranks) > 1.02 * uniform


@pytest.mark.parametrize("seed", range(60))
def test_many_budgets_share_what_they_have_in_common(seed: int) -> None:
    """One knapsack chooses under each budget what the plain definition does, to the last bit."""
    rng = random.Random(seed)
    tables = {}
    for item in range(rng.randint(1, 12)):
        names = tuple(f"{item}.{n}" for n in range(rng.randint(1, 2)))
        ranks = [[0, *sorted(rng.sample((1, 2, 4, 8, 16), rng.randint(0, 4)))] for _ in names]
        prices = sorted(rng.choice((1, 3, 1000, 1e6)) * rng.randint(1, 50) for _ in range(99))

        def bytes_of(own: tuple[int, ...], prices: list[float] = prices) -> float:
            return float(prices[sum(own)])  # never less for larger ranks

        importance = [rng.choice((0.0, 1.0, rng.random())) for _ in names]
        tables[names] = rank_table(importance, ranks, bytes_of, rng.choice(("log", "linear")))
    least = sum(table[0].num_bytes for table in tables.values())
    most = sum(table[-1].num_bytes for table in tables.values())
    knapsack = Knapsack(tables)

    for share in (0.0, 1.0, 2.0, *(rng.random() ** 3 for _ in range(20))):
        budget = least + share * (most - least)

        assert knapsack.choose(budget) == plain_choice(tables, budget)
