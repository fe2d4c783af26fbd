"""Deal one data set out to simulated devices: contiguous, iid, or Dirichlet-skewed.

Real devices bring their own data; this is for simulations and tests. Every sample goes to exactly
one shard and no shard is empty. Positions in, positions out; numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def contiguous_shards(num_samples: int, num_shards: int) -> list[IntArray]:
    """Cut the data set in its order into shards whose sizes differ by one at most.

    Raises:
        ValueError: Fewer samples than shards, or no shard at all.
    """
    _check(num_samples, num_shards)
    return np.array_split(np.arange(num_samples, dtype=np.int64), num_shards)


def iid_shards(num_samples: int, num_shards: int, seed: int) -> list[IntArray]:
    """Deal the samples out at random, in shards whose sizes differ by one at most.

    Returns:
        Per shard the positions of its samples, ascending.

    Raises:
        ValueError: Fewer samples than shards, or no shard at all.
    """
    _check(num_samples, num_shards)
    order = np.random.default_rng(seed).permutation(num_samples).astype(np.int64)
    return [np.sort(part) for part in np.array_split(order, num_shards)]


def dirichlet_shards(
    classes: Sequence[int] | npt.NDArray[np.integer], num_shards: int, alpha: float, seed: int
) -> list[IntArray]:
    """Deal each class out in proportions drawn from Dirichlet(alpha) (arXiv 1909.06335).

    Small *alpha*: each class sits on few devices; large: nearly iid. Sizes differ too. Ours: a
    shard that drew nothing gets one sample from the largest, instead of drawing until none is
    empty, which for small *alpha* may take for ever.

    Args:
        classes: (N,) class of each sample: its label, or a length class (length_classes).
        num_shards: Number of devices.
        alpha: Concentration, above 0.
        seed: Seed of the proportions and of who gets which sample of a class.

    Returns:
        Per shard the positions of its samples, ascending.

    Raises:
        ValueError: Fewer samples than shards, no shard at all, or *alpha* is not positive.
    """
    values = np.asarray(classes)
    if values.ndim != 1:
        raise ValueError(f"classes must have one dimension, got {values.ndim}")
    _check(len(values), num_shards)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ValueError(f"alpha must be a number above 0, got {alpha}")
    rng = np.random.default_rng(seed)
    owner = np.empty(len(values), dtype=np.int64)
    for value in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == value))
        bounds = np.round(np.cumsum(_proportions(rng, num_shards, alpha))[:-1] * len(members))
        parts = np.split(members, bounds.astype(np.int64))
        for shard, part in enumerate(parts):
            owner[part] = shard
    _fill_empty(owner, num_shards, rng)
    return [np.flatnonzero(owner == shard).astype(np.int64) for shard in range(num_shards)]


def length_classes(lengths: Sequence[int] | npt.NDArray[np.integer], num_classes: int) -> IntArray:
    """Return the quantile (N,) of each length, 0 to num_classes - 1; equal lengths stay together.

    Raises:
        ValueError: *num_classes* is not positive, or there are no lengths.
    """
    values = np.asarray(lengths)
    if num_classes < 1 or not len(values):
        raise ValueError(f"num_classes must be at least 1, got {num_classes} for {len(values)}")
    inner = np.quantile(values, np.arange(1, num_classes) / num_classes)
    return np.searchsorted(inner, values, side="right").astype(np.int64)


def _proportions(
    rng: np.random.Generator, num_shards: int, alpha: float
) -> npt.NDArray[np.float64]:
    """Draw the share of each shard; all to one where a tiny alpha makes every draw 0."""
    drawn = rng.dirichlet(np.full(num_shards, alpha))
    if not np.isfinite(drawn).all() or abs(drawn.sum() - 1.0) > 1e-6:
        drawn = np.zeros(num_shards)
        drawn[rng.integers(num_shards)] = 1.0
    return drawn


def _fill_empty(owner: IntArray, num_shards: int, rng: np.random.Generator) -> None:
    """Give every empty shard one sample of the shard that is largest at that time, in place."""
    sizes = np.bincount(owner, minlength=num_shards)
    for shard in np.flatnonzero(sizes == 0):
        giver = int(np.argmax(sizes))
        owner[rng.choice(np.flatnonzero(owner == giver))] = shard
        sizes[giver] -= 1
        sizes[shard] += 1


def _check(num_samples: int, num_shards: int) -> None:
    """Refuse what would leave a shard empty."""
    if not 1 <= num_shards <= num_samples:
        raise ValueError(f"num_shards must be 1 to {num_samples} (samples), got {num_shards}")
