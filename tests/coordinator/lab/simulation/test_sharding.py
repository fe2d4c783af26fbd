"""Shards: every sample on exactly one device, no device empty, skewed as asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.lab.simulation.sharding import (
    contiguous_shards,
    dirichlet_shards,
    iid_shards,
    length_classes,
)

Shards = list[npt.NDArray[np.int64]]
counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


def assert_partition(shards: Shards, num_samples: int, num_shards: int) -> None:
    """Check that every sample is in one shard, and every shard has one, in ascending order."""
    assert len(shards) == num_shards
    assert all(len(shard) for shard in shards)
    assert all(shard.dtype == np.int64 for shard in shards)
    assert all((np.diff(shard) > 0).all() for shard in shards)
    assert sorted(np.concatenate(shards).tolist()) == list(range(num_samples))


@given(counts, st.integers(0, 99))
def test_even_shards_are_partitions(sizes: tuple[int, int], seed: int) -> None:
    """Contiguous and iid shards hold every sample once, and sizes differ by one at most."""
    for shards in (contiguous_shards(*sizes), iid_shards(*sizes, seed)):
        assert_partition(shards, *sizes)
        lengths = [len(shard) for shard in shards]
        assert max(lengths) - min(lengths) <= 1


@given(
    st.lists(st.integers(-3, 9), min_size=1, max_size=100),
    st.data(),
    st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0]),
    st.integers(0, 99),
)
def test_dirichlet_shards_are_partitions(
    classes: list[int], data: st.DataObject, alpha: float, seed: int
) -> None:
    """Whatever the skew, every sample is dealt once and nobody goes empty-handed."""
    num_shards = data.draw(st.integers(1, len(classes)))

    shards = dirichlet_shards(classes, num_shards, alpha, seed)

    assert_partition(shards, len(classes), num_shards)
    again = dirichlet_shards(classes, num_shards, alpha, seed)
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))


def test_contiguous_shards_keep_the_order() -> None:
    """The first device gets the first samples."""
    assert [shard.tolist() for shard in contiguous_shards(5, 2)] == [[0, 1, 2], [3, 4]]


def test_seeds_give_other_shards() -> None:
    """Another seed deals differently."""
    classes = np.arange(100) % 4

    assert not np.array_equal(iid_shards(100, 2, 0)[0], iid_shards(100, 2, 1)[0])
    first, second = (dirichlet_shards(classes, 2, 1.0, seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


def skew(alpha: float) -> float:
    """Return how far, on average, the classes of a shard are from those of the whole (0 to 1)."""
    classes = np.arange(4000) % 10
    shards = dirichlet_shards(classes, 8, alpha, seed=0)
    shares = [np.bincount(classes[shard], minlength=10) / len(shard) for shard in shards]
    return float(np.mean([np.abs(share - 0.1).sum() / 2 for share in shares]))


def test_alpha_sets_the_skew() -> None:
    """Small alpha gives each device few classes; large alpha gives all of them to everyone."""
    assert skew(0.05) > 0.6 > skew(1.0) > 0.1 > skew(1000.0)


def test_lengths_can_stand_for_classes() -> None:
    """Quantiles of length are equally full, ordered, and keep equal lengths together."""
    lengths = np.random.default_rng(0).permutation(1000)

    classes = length_classes(lengths, 4)

    assert np.bincount(classes).tolist() == [250, 250, 250, 250]
    assert all(lengths[classes == c].max() < lengths[classes == c + 1].min() for c in range(3))
    assert len(set(length_classes([5] * 10, 4).tolist())) == 1
    assert length_classes([3, 1], 1).tolist() == [0, 0]


@pytest.mark.parametrize(("num_samples", "num_shards"), [(2, 3), (0, 1), (5, 0), (5, -1)])
def test_impossible_shards_are_refused(num_samples: int, num_shards: int) -> None:
    """Fewer samples than devices, or no device, cannot be dealt."""
    for deal in (
        lambda: contiguous_shards(num_samples, num_shards),
        lambda: iid_shards(num_samples, num_shards, 0),
        lambda: dirichlet_shards([0] * num_samples, num_shards, 1.0, 0),
    ):
        with pytest.raises(ValueError, match=f"num_shards must be 1 to {num_samples}"):
            deal()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_concentrations_are_refused(alpha: float) -> None:
    """Alpha is a positive, finite number."""
    with pytest.raises(ValueError, match="alpha must be a number above 0"):
        dirichlet_shards([0, 1], 2, alpha, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dirichlet_shards([[0, 1]], 1, 1.0, 0), "one dimension"),  # type: ignore[list-item]
        (lambda: length_classes([1, 2], 0), "num_classes must be at least 1"),
        (lambda: length_classes([], 2), "num_classes"),
    ],
)
def test_bad_classes_are_refused(call: Any, words: str) -> None:
    """Classes are one number per sample, and there is at least one sample."""
    with pytest.raises(ValueError, match=words):
        call()
