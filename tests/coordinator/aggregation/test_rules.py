"""Joining adapters is the sum that it claims to be, for any ranks, shares and order of arrival."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.rules import (
    RULES,
    SERVER,
    Contribution,
    exact,
    fedavg,
    mean_of,
    residual,
    shares,
)
from edge_sdk.errors import ConfigError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import Shape

SHAPE = Shape(7, 5)
RANKS = st.lists(st.integers(1, 5), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


def random_pair(generator: np.random.Generator, rank: int) -> Pair:
    """Random factors."""
    a_RI = generator.normal(size=(rank, SHAPE.num_inputs)).astype(np.float32)
    return Pair(a_RI, generator.normal(size=(SHAPE.num_outputs, rank)).astype(np.float32))


def random_contributions(
    ranks: list[int], seed: int, scale: float | None = None
) -> dict[str, Contribution]:
    """Participants with unequal shares and scales, the coordinator among them."""
    generator = np.random.default_rng(seed)
    weight = generator.uniform(0.1, 1.0, len(ranks))
    names = [SERVER, *(f"device-{i}" for i in range(1, len(ranks)))]
    return {
        name: Contribution(
            float(share),
            float(generator.uniform(0.5, 4.0)) if scale is None else scale,
            random_pair(generator, rank),
            random_pair(generator, rank),
        )
        for name, rank, share in zip(names, ranks, weight / weight.sum(), strict=True)
    }


def dense(pair: Pair) -> np.ndarray:
    """B A in float64."""
    product: np.ndarray = pair.b_OR.astype(np.float64) @ pair.a_RI.astype(np.float64)
    return product


def progress(contributions: Mapping[str, Contribution]) -> np.ndarray:
    """The dense sum of what everybody learned, weighted by shares that sum to 1."""
    total = sum(c.share for c in contributions.values())
    return sum(
        (
            c.share / total * c.scale * (dense(c.after) - dense(c.before))
            for c in contributions.values()
        ),
        np.zeros(SHAPE),
    )


@given(RANKS, SEEDS)
@settings(deadline=None, max_examples=60)
def test_exact_is_the_dense_sum(ranks: list[int], seed: int) -> None:
    """With any mixture of ranks, scales and shares dW grows by the sum of everybody's progress."""
    contributions = random_contributions(ranks, seed)

    update = exact(contributions, SHAPE, None)

    assert update.change is not None
    assert (update.total, update.cut_error) == (None, 0.0)
    expected = progress(contributions)
    error = np.linalg.norm(update.change.dense() - expected) / np.linalg.norm(expected)
    assert error <= 1e-6


@given(RANKS, SEEDS, st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_a_rank_cap_cuts_what_it_says(ranks: list[int], seed: int, cap: int) -> None:
    """The reported error is the share of the sum that the cap has cut."""
    contributions = random_contributions(ranks, seed)

    update = exact(contributions, SHAPE, cap)

    assert update.change is not None
    assert update.change.rank <= cap
    expected = progress(contributions)
    error = np.linalg.norm(update.change.dense() - expected) / np.linalg.norm(expected)
    assert update.cut_error == pytest.approx(error, abs=2e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cap", [None, 2])
def test_the_order_of_arrival_changes_no_bit(name: str, cap: int | None) -> None:
    """Whoever reports first, the result is the same to the last bit."""
    contributions = random_contributions([3, 3, 3, 3], seed=1)

    results = [
        RULES[name].join(dict(order), SHAPE, cap)
        for order in itertools.permutations(contributions.items())
    ]

    first = results[0].total or results[0].change
    assert first is not None
    for result in results[1:]:
        other = result.total or result.change
        assert other is not None
        assert all(map(np.array_equal, other, first))


def test_fedavg_refuses_unequal_ranks() -> None:
    """Means of factors of different ranks have no meaning; the error says what does."""
    contributions = random_contributions([2, 3], seed=0)

    with pytest.raises(ConfigError, match=r"equal ranks, got \[2, 3\]; use 'fedex'"):
        fedavg(contributions, SHAPE, None)


def test_shares_are_those_of_the_reporters() -> None:
    """When some do not report, the shares of the others still sum to 1."""
    contributions = random_contributions([1, 1, 1], seed=0)
    del contributions["device-1"]

    found = shares(contributions)

    assert sum(found.values()) == pytest.approx(1.0)
    left = {name: c.share for name, c in contributions.items()}
    assert found["device-2"] / found[SERVER] == pytest.approx(left["device-2"] / left[SERVER])


def test_a_mean_is_taken_in_float64() -> None:
    """Many small terms beside a large one are not lost in float32."""
    values = {f"{i:04}": np.full(1, 1e-5, np.float32) for i in range(1000)}
    values["0"] = np.full(1, 1e5, np.float32)
    weight = dict.fromkeys(values, 1.0)

    (mean,) = mean_of(values, weight)

    assert mean == np.float32(1e5 + 1000 * np.float64(np.float32(1e-5)))


@given(st.integers(1, 5), st.integers(1, 5), SEEDS)
@settings(deadline=None, max_examples=40)
def test_residual_and_own_adapter_make_the_whole(first: int, second: int, seed: int) -> None:
    """What is added to a participant's adapter is what it lacks of dW."""
    generator = np.random.default_rng(seed)
    total = Factors(*reversed(random_pair(generator, first)))
    own = Factors(*reversed(random_pair(generator, second)))

    rest = residual(total, own)

    scale = np.linalg.norm(total.dense()) + np.linalg.norm(own.dense())
    assert np.linalg.norm(rest.dense() + own.dense() - total.dense()) <= 1e-6 * scale


def test_without_an_adapter_the_residual_is_everything() -> None:
    """A participant without an adapter of a weight gets dW itself."""
    total = Factors(*reversed(random_pair(np.random.default_rng(0), 3)))

    assert residual(total, None) is total
