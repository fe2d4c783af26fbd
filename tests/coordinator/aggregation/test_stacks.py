"""What is joined of experts that lie in one weight is what would be joined of each by itself."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.rules import RULES, Contribution, Update, resize_pair
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.optimizer_state import fitted
from edge_sdk.lora.rank_pruning import penalty_gradients
from edge_sdk.lora.targets import Shape

ONE, ALL = Shape(7, 5), Shape(3, 7, 5)
RANKS = {"": 3, "a": 2, "b": 4}


def pair(rank: int, seed: int, *, alike: bool = False) -> Pair:
    """Factors of a stack; *alike*: of the same expert again and again."""
    draw = np.random.default_rng(seed)
    a, b = (draw.normal(size=sizes).astype(np.float32) for sizes in ALL.factors(rank))
    return Pair(np.repeat(a[:1], 3, 0), np.repeat(b[:1], 3, 0)) if alike else Pair(a, b)


def only(found: Pair, expert: int) -> Pair:
    """The factors of one expert."""
    return Pair(found.a_RI[expert], found.b_OR[expert])


def contributions(ranks: dict[str, int], *, alike: bool) -> dict[str, Contribution]:
    """What three participants bring."""
    return {
        name: Contribution(share, 0.5, pair(rank, 2, alike=alike), pair(rank, n, alike=alike))
        for n, ((name, rank), share) in enumerate(zip(ranks.items(), (0.5, 0.2, 0.3), strict=True))
    }


def matrix(update: Update) -> Factors:
    """The matrix that a rule makes."""
    found = update.total if update.total is not None else update.change
    assert found is not None
    return found


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_joins_expert_by_expert(rule: str) -> None:
    """And hands out again by expert; HetLoRA's weights are by the norm of all experts together."""
    ranks = dict.fromkeys(RANKS, 3) if RULES[rule].needs_equal_ranks else RANKS
    brought = contributions(ranks, alike=rule == "zeropad")
    fresh = pair(4, 9)

    found = matrix(RULES[rule].join(brought, ALL, None))

    for expert in range(3):
        single = {
            name: Contribution(c.share, c.scale, only(c.before, expert), only(c.after, expert))
            for name, c in brought.items()
        }
        expected = matrix(RULES[rule].join(single, ONE, None))
        np.testing.assert_allclose(found.dense()[expert], expected.dense(), atol=1e-5)
        if (redistribute := RULES[rule].redistribute) is not None:
            held = only(redistribute(found, fresh, 0.5), expert)
            alone = redistribute(expected, only(fresh, expert), 0.5)
            np.testing.assert_allclose(held.b_OR @ held.a_RI, alone.b_OR @ alone.a_RI, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_another_rank_is_another_rank_for_each(rank: int) -> None:
    """Factors, moments and the penalty on tails follow, expert by expert."""
    held, fresh = pair(3, 0), pair(rank, 1)
    moments = {"w.A.exp_avg": held.a_RI, "w.B.exp_avg_sq": held.b_OR}

    resized = resize_pair(held, fresh, 2.0)
    kept = fitted(moments, {"w": rank}, lambda _, r: 1.0 / r)

    for expert in range(3):
        alone = resize_pair(only(held, expert), only(fresh, expert), 2.0)
        np.testing.assert_array_equal(resized.a_RI[expert], alone.a_RI)
        np.testing.assert_array_equal(resized.b_OR[expert], alone.b_OR)
        single = {key: value[expert] for key, value in moments.items()}
        for key, value in fitted(single, {"w": rank}, lambda _, r: 1.0 / r).items():
            np.testing.assert_array_equal(kept[key][expert], value)
    tails = penalty_gradients(held, 0.7)
    assert not tails.a_RI[:, :2].any()
    assert tails.a_RI[:, 2:].all()
    assert not tails.b_OR[..., :2].any()
