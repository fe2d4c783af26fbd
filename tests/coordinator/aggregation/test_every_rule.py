"""Every published rule is its paper's formula, checked against dense matrices in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.rules import (
    RULES,
    Contribution,
    balanced,
    fedavg,
    resize_pair,
    slowed,
    svd,
    svd_asymmetric,
    truncate,
    zeropad,
)
from edge_sdk.lora.adapters import Pair, initial_pair
from tests.coordinator.aggregation.test_rules import (
    RANKS,
    SEEDS,
    SHAPE,
    dense,
    progress,
    random_contributions,
    random_pair,
)


def fresh(rank: int) -> Pair:
    """Factors as they are drawn."""
    return initial_pair("w", rank, SHAPE, seed=0)


def weighted_sum(contributions: Mapping[str, Contribution]) -> np.ndarray:
    """The dense sum_i p_i s_i B_i A_i."""
    total = sum(c.share for c in contributions.values())
    terms = (c.share / total * c.scale * dense(c.after) for c in contributions.values())
    return sum(terms, np.zeros(SHAPE))


@pytest.mark.parametrize("rule", ["fedavg", "fedex"])
@given(st.integers(2, 5), st.integers(1, 5), SEEDS, st.floats(0.1, 2.0))
@settings(deadline=None, max_examples=40)
def test_a_server_learning_rate_moves_means_by_so_much(
    rule: str, num: int, rank: int, seed: int, rate: float
) -> None:
    """All go on from between where they began, on the mean, and the mean of where they ended."""
    contributions = random_contributions([rank] * num, seed, scale=2.0)
    began = {n: replace(c, after=c.before) for n, c in contributions.items()}

    there, start, end = (
        update.shared or update.total
        for update in (
            RULES[rule].join(each, SHAPE, None)
            for each in (slowed(contributions, rate), began, contributions)
        )
    )

    assert there is not None
    assert start is not None
    assert end is not None
    for found, old, new in zip(there, start, end, strict=True):
        np.testing.assert_allclose(found, old + rate * (new - old), atol=2e-5)


def test_what_one_alone_has_trained_is_not_slowed() -> None:
    """The coordinator's blocks that no device holds go as far as they went."""
    contributions = random_contributions([3], 0)

    assert slowed(contributions, 0.5) is contributions


@given(st.integers(1, 5), st.integers(1, 5), SEEDS)
@settings(deadline=None, max_examples=40)
def test_fedavg_is_the_weighted_mean_of_each_factor(num: int, rank: int, seed: int) -> None:
    """A and B are averaged apart, in float64, and everybody gets the same pair."""
    contributions = random_contributions([rank] * num, seed, scale=2.0)

    update = fedavg(contributions, SHAPE, None)

    assert update.change is None
    assert update.total is not None
    pair = truncate(update.total, fresh(rank), 2.0)
    for factor in ("a_RI", "b_OR"):
        expected = sum(
            c.share * getattr(c.after, factor).astype(np.float64) for c in contributions.values()
        )
        np.testing.assert_allclose(getattr(pair, factor), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("redistribute", [svd_asymmetric, balanced])
@given(ranks=RANKS, rank=st.integers(1, 5), seed=SEEDS, scale=st.floats(0.1, 8.0))
@settings(deadline=None, max_examples=40)
def test_svd_hands_out_the_best_approximation(
    redistribute: Any, ranks: list[int], rank: int, seed: int, scale: float
) -> None:
    """DW is the dense sum, and a participant of rank r holds its best approximation of rank r."""
    contributions = random_contributions(ranks, seed)

    update = svd(contributions, SHAPE, None)

    assert update.total is not None
    expected = weighted_sum(contributions)
    size = np.linalg.norm(expected)
    assert np.linalg.norm(update.total.dense() - expected) <= 1e-6 * size
    u, sigma, vt = np.linalg.svd(expected, full_matrices=False)
    best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    pair = redistribute(update.total, fresh(rank), scale)
    assert pair.a_RI.shape == (rank, SHAPE.num_inputs)
    found = np.linalg.norm(expected - scale * dense(pair))
    assert found <= np.linalg.norm(expected - best) + 3e-6 * size


def test_a_recut_leaves_rows_of_a_as_long_as_drawn() -> None:
    """After a re-cut A's rows have the norm of fresh ones, so that a learning rate still fits."""
    update = svd(random_contributions([3, 2], seed=0), SHAPE, None)

    assert update.total is not None
    pair = svd_asymmetric(update.total, fresh(3), 4.0)
    np.testing.assert_allclose(np.linalg.norm(pair.a_RI, axis=1), 3**-0.5, rtol=1e-5)


@given(RANKS, SEEDS)
@settings(deadline=None, max_examples=40)
def test_zeropad_is_the_papers_formula(ranks: list[int], seed: int) -> None:
    """Padded with zeros, averaged with |dW_k| / sum_j |dW_j|, truncated to each rank."""
    contributions = random_contributions(ranks, seed)

    update = zeropad(contributions, SHAPE, None)

    assert update.total is not None
    size = {n: np.linalg.norm(c.scale * dense(c.after)) for n, c in contributions.items()}
    largest = max(ranks)
    mean_a, mean_b = np.zeros((largest, SHAPE.num_inputs)), np.zeros((SHAPE.num_outputs, largest))
    for name, c in contributions.items():
        rank = c.after.a_RI.shape[0]
        weight = size[name] / sum(size.values())
        mean_a[:rank] += weight * c.after.a_RI
        mean_b[:, :rank] += weight * c.scale * c.after.b_OR
    np.testing.assert_allclose(update.total.a_RI, mean_a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(update.total.b_OR, mean_b, rtol=1e-5, atol=1e-5)
    for rank in ranks:
        pair = truncate(update.total, fresh(rank), 2.0)
        np.testing.assert_allclose(pair.a_RI, mean_a[:rank], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(2 * pair.b_OR, mean_b[:, :rank], rtol=1e-5, atol=1e-5)


@given(RANKS, SEEDS)
@settings(deadline=None, max_examples=40)
def test_fedex_is_the_mean_and_what_it_misses(ranks: list[int], seed: int) -> None:
    """DW grows by the mean of the products; each rank goes on as the mean over those that have it.

    With equal ranks these means are those of `fedavg`, as the paper has them.
    """
    contributions = random_contributions(ranks, seed)

    update = RULES["fedex"].join(contributions, SHAPE, None)

    assert update.change is not None
    assert update.shared is not None
    change = progress(contributions)
    assert np.linalg.norm(update.change.dense() - change) <= 1e-6 * np.linalg.norm(change)
    for rank in range(max(ranks)):
        holders = [c for c in contributions.values() if c.after.a_RI.shape[0] > rank]
        total = sum(c.share for c in holders)
        row = sum(c.share / total * c.after.a_RI[rank].astype(np.float64) for c in holders)
        column = sum(c.share / total * c.scale * c.after.b_OR[:, rank] for c in holders)
        np.testing.assert_allclose(update.shared.a_RI[rank], row, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(update.shared.b_OR[:, rank], column, rtol=1e-5, atol=1e-5)
    if len(set(ranks)) == 1:
        means = fedavg(contributions, SHAPE, None).total
        assert means is not None
        for factor, mean in zip(update.shared, means, strict=True):
            np.testing.assert_allclose(factor, mean, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 4), SEEDS)
@settings(deadline=None, max_examples=40)
def test_equal_beginnings_count_as_often_as_there_are(num: int, rank: int, seed: int) -> None:
    """Where all, or some, have begun with the same factors the change is what it was."""
    drawn = random_contributions([rank] * num, seed)
    first = min(drawn)
    for same in (drawn.keys(), list(drawn)[::2]):
        contributions = {
            name: replace(c, before=drawn[first].before) if name in same else c
            for name, c in drawn.items()
        }

        update = RULES["exact"].join(contributions, SHAPE, None)

        assert update.change is not None
        expected = progress(contributions)
        error = np.linalg.norm(update.change.dense() - expected)
        assert error <= 1e-6 * np.linalg.norm(expected)


@given(RANKS, SEEDS)
@settings(deadline=None, max_examples=40)
def test_stacking_fresh_adapters_is_their_weighted_sum(ranks: list[int], seed: int) -> None:
    """From B = 0 the change is sum_i p_i s_i B_i A_i, as NAA and FLoRA have it."""
    contributions = {
        name: Contribution(c.share, c.scale, fresh(c.after.a_RI.shape[0]), c.after)
        for name, c in random_contributions(ranks, seed).items()
    }

    update = RULES["stack"].join(contributions, SHAPE, None)

    assert RULES["stack"].restarts
    assert update.change is not None
    expected = weighted_sum(contributions)
    assert np.linalg.norm(update.change.dense() - expected) <= 1e-6 * np.linalg.norm(expected)


@given(st.integers(1, 5), st.integers(1, 5), SEEDS, st.floats(0.2, 5.0))
@settings(deadline=None, max_examples=40)
def test_a_changed_rank_keeps_the_first_ranks(old: int, new: int, seed: int, ratio: float) -> None:
    """More ranks add nothing to s B A, and fewer drop the last ones and touch no other."""
    pair = random_pair(np.random.default_rng(seed), old)

    found = resize_pair(pair, fresh(new), ratio)

    kept = min(old, new)
    expected = pair.b_OR[:, :kept].astype(np.float64) @ pair.a_RI[:kept].astype(np.float64)
    assert found.a_RI.shape[0] == new
    np.testing.assert_array_equal(found.a_RI[:kept], pair.a_RI[:kept])
    np.testing.assert_allclose(dense(found) / ratio, expected, rtol=1e-4, atol=1e-5)
