"""What a few hostile devices can do at most to what all have learned: bounds before any rule. Pure.

Each step changes the devices' contributions and leaves the rule alone, so that every rule may be
had with it. Changes are compared as factors, |D|^2 and <D, E> by small products; no matrix of a
weight's size is formed. The coordinator's own contribution is trusted, and never changed.

For whom all this is, and what it costs: docs/method.md, Distrusted fleets.

Legend: N devices, R rank, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, NamedTuple

import numpy as np

from coordinator.aggregation.rules import SERVER, Contribution, product, scaled_back
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors, norm, stack

# Devices below which nobody can tell who is unlike the others.
LEAST_DEVICES = 3

ByWeight = Mapping[str, Mapping[str, Contribution]]
"""Contributions by weight and participant."""
Method = Literal["none", "krum", "trimmed-mean"]


class Screened(NamedTuple):
    """What is left of the contributions, and what was done to them."""

    contributions: ByWeight
    left_out: list[str]
    """Devices of which nothing is joined."""
    clipped: list[str]
    """Devices that count with a part of what they have moved some weight by."""


@dataclass(frozen=True)
class Robust:
    """How the contributions of a few are kept from deciding for all."""

    method: Method = "none"
    hostile: int = 1
    """Most devices that are hostile at once."""
    clip: float = 0.0
    """Most that a device may move a weight by, in medians of all; 0: anything."""

    def __call__(self, contributions: ByWeight) -> Screened:
        """Return what is to be joined."""
        if self == TRUSTING:
            return Screened(contributions, [], [])
        left_out: list[str] = []
        if self.method == "krum":
            left_out = outvoted(contributions, self.hostile)
            contributions = without(contributions, left_out)
        if self.method == "trimmed-mean":
            contributions = {w: trimmed(own, self.hostile) for w, own in contributions.items()}
        clipped: set[str] = set()
        if self.clip:
            found = {w: clipped_to(own, self.clip) for w, own in contributions.items()}
            contributions = {weight: own for weight, (own, _) in found.items()}
            clipped = {name for _, names in found.values() for name in names}
        return Screened(contributions, left_out, sorted(clipped))

    def heads(
        self, heads: Mapping[str, Mapping[str, Array]], old: Mapping[str, Array]
    ) -> Mapping[str, Mapping[str, Array]]:
        """Return the trained heads that are to be joined, by participant.

        Args:
            heads: What the holders have.
            old: The head that all began with; empty in the first round, in which none is clipped.
        """
        devices = {name: head for name, head in heads.items() if name != SERVER}
        if len(devices) < LEAST_DEVICES:
            return heads
        if self.method == "trimmed-mean":
            keys = next(iter(devices.values()))
            mean = {k: _middle([h[k] for h in devices.values()], self.hostile) for k in keys}
            found = {key: value.astype(np.float32) for key, value in mean.items()}
            return {name: found if name in devices else head for name, head in heads.items()}
        if self.clip and old:
            return {**heads, **_heads_moved_back(devices, old, self.clip)}
        return heads


TRUSTING = Robust()
"""All count as they are."""


def _heads_moved_back(
    heads: Mapping[str, Mapping[str, Array]], old: Mapping[str, Array], most: float
) -> dict[str, Mapping[str, Array]]:
    """Return heads none of which has moved from the old one by more than *most* medians."""
    moved = {n: {k: h[k].astype(np.float64) - old[k] for k in old} for n, h in heads.items()}
    sizes = {
        n: math.sqrt(sum(np.square(d).sum() for d in own.values())) for n, own in moved.items()
    }
    bound = most * median(sizes.values())
    return {
        name: head
        if sizes[name] <= bound
        else {k: (old[k] + bound / sizes[name] * moved[name][k]).astype(np.float32) for k in old}
        for name, head in heads.items()
    }


def without(contributions: ByWeight, devices: Iterable[str]) -> ByWeight:
    """Return the contributions of all but *devices*."""
    gone = set(devices)
    return {
        weight: {name: c for name, c in own.items() if c.device not in gone}
        for weight, own in contributions.items()
    }


def change(contribution: Contribution) -> Factors:
    """Return by what a participant has moved a weight: s B' A' - s B A, as factors."""
    after = product(contribution.after, contribution.scale)
    if not contribution.before.b_OR.any():
        return after
    return stack([after, product(contribution.before, -contribution.scale)])


def _changes(own: Mapping[str, Contribution]) -> dict[str, Factors]:
    """Return what each device has moved a weight by, all of its updates together."""
    terms: dict[str, list[Factors]] = {}
    for name in sorted(own):
        if name != SERVER:
            terms.setdefault(own[name].device, []).append(change(own[name]))
    return {device: stack(found) for device, found in terms.items()}


# ---- clipping by norm ----------------------------------------------------------------------------


def clipped_to(
    own: Mapping[str, Contribution], most: float
) -> tuple[Mapping[str, Contribution], list[str]]:
    """Return one weight's contributions, none of which moves it by more than *most* medians.

    A change that is too large is made smaller by moving both factors back towards where they began,
    until the bound holds for certain: |c X + c^2 Y|_F <= c |X|_F + c^2 |Y|_F for 0 <= c <= 1, where
    X = s (B dA + dB A) and Y = s dB dA. Clipping by norm is that of Sun et al. (1911.07963). All
    updates that a device has in a merge count together.

    Returns:
        The contributions, and the devices whose were made smaller.
    """
    by_device = {device: norm(moved) for device, moved in _changes(own).items()}
    if len(by_device) < LEAST_DEVICES:
        return own, []
    bound = most * median(by_device.values())
    far = {device for device, size in by_device.items() if size > bound}
    sizes = {n: norm(change(c)) for n, c in own.items() if n != SERVER and c.device in far}
    total = dict.fromkeys(far, 0.0)
    for name, size in sizes.items():
        total[own[name].device] += size
    found = dict(own)
    for name, size in sizes.items():  # its updates share what the device may do
        found[name] = _moved_back(own[name], bound * size / total[own[name].device])
    return found, sorted(far)


def _moved_back(contribution: Contribution, bound: float) -> Contribution:
    """Return a contribution whose change has at most the norm *bound*."""
    before, after = contribution.before, contribution.after
    a_RI, b_OR = (new.astype(np.float64) - old for old, new in zip(before, after, strict=True))
    scale = contribution.scale
    first = norm(stack([Factors(before.b_OR * scale, a_RI), Factors(b_OR * scale, before.a_RI)]))
    second = norm(Factors(b_OR * scale, a_RI))
    # The root of c^2 second + c first = bound, written so that nothing cancels.
    root = first + math.sqrt(first * first + 4.0 * second * bound)
    part = min(1.0, 2.0 * bound / root) if root else 1.0
    return scaled_back(contribution, part)


# ---- Krum ----------------------------------------------------------------------------------------


def outvoted(contributions: ByWeight, hostile: int) -> list[str]:
    """Return the *hostile* devices that are furthest from their nearest others.

    Multi-Krum (Blanchard et al., 1703.02757): a device's score is the sum of the squared distances
    to the n - f - 2 devices next to it; those with the f largest scores are left out. A distance is
    the mean over the weights that both train, each over the weight's median square, as devices of
    different splits do not train the same ones; ours. With fewer than 2 f + 3 devices, f is as
    large as their number allows.
    """
    changes = {weight: _changes(own) for weight, own in contributions.items()}
    devices = sorted({device for own in changes.values() for device in own})
    num_out = min(hostile, (len(devices) - 3) // 2)
    if num_out < 1:
        return []
    total, shared = np.zeros((2, len(devices), len(devices)))
    place = {device: number for number, device in enumerate(devices)}
    for own in changes.values():
        names = sorted(own)
        if len(names) < 2:
            continue
        squares = distances([own[name] for name in names])
        at = np.ix_([place[name] for name in names], [place[name] for name in names])
        total[at] += squares
        shared[at] += 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_NN = np.where(shared > 0, total / shared, np.inf)
    scores = {}
    for device, number in place.items():
        near = np.sort(np.delete(mean_NN[number], number))
        near = near[np.isfinite(near)][: len(devices) - num_out - 2]
        scores[device] = float(near.mean()) if len(near) else 0.0
    worst = sorted(devices, key=lambda device: (-scores[device], device))
    return sorted(worst[:num_out])


def distances(changes: list[Factors]) -> Array:
    """Return the squared distances of changes of one weight, over their median square."""
    sizes = [len(changes)] * 2
    products_NN = np.zeros(sizes)
    for i, one in enumerate(changes):
        for j in range(i, len(changes)):
            products_NN[i, j] = products_NN[j, i] = inner(one, changes[j])
    squares_N = np.diag(products_NN)
    found: Array = np.maximum(squares_N[:, None] + squares_N[None, :] - 2.0 * products_NN, 0.0)
    usual = float(np.median(squares_N)) or float(squares_N.max()) or 1.0
    return found / usual


def inner(one: Factors, other: Factors) -> float:
    """Return the sum of the products of two matrices' numbers: tr(A^T B^T C D), never formed."""
    left = np.swapaxes(one.b_OR.astype(np.float64), -1, -2) @ other.b_OR
    right = one.a_RI.astype(np.float64) @ np.swapaxes(other.a_RI, -1, -2)
    return float((left * right).sum())


# ---- trimmed mean --------------------------------------------------------------------------------


def trimmed(own: Mapping[str, Contribution], hostile: int) -> Mapping[str, Contribution]:
    """Return contributions in which each device has the trimmed mean of all devices' factors.

    Number by number, of A and of s B apart, the *hostile* smallest and largest are left out and the
    rest is averaged (Yin et al., 1803.01498); rank by rank among those that have it, as the first
    ranks of all began alike. Where they are too few, what is left is the median. Samples do not
    count. The rule then means over devices of which each says the same.
    """
    names = sorted(name for name in own if name != SERVER)
    if len(names) < LEAST_DEVICES:
        return own
    ranks = {name: own[name].after.a_RI.shape[-2] for name in names}
    a_RI: dict[str, list[Array]] = {}
    b_OR: dict[str, list[Array]] = {}
    first = 0
    for last in sorted(set(ranks.values())):  # ranks first .. last - 1 have the same holders
        holders = [name for name in names if ranks[name] >= last]
        part = slice(first, last)
        rows = _middle([own[n].after.a_RI[..., part, :] for n in holders], hostile)
        columns = _middle([own[n].after.b_OR[..., part] * own[n].scale for n in holders], hostile)
        for name in holders:
            a_RI.setdefault(name, []).append(rows)
            b_OR.setdefault(name, []).append(columns / own[name].scale)
        first = last
    means = {
        name: Pair(
            np.concatenate(a_RI[name], axis=-2).astype(np.float32),
            np.concatenate(b_OR[name], axis=-1).astype(np.float32),
        )
        for name in names
    }
    return {n: replace(c, after=means[n]) if n in means else c for n, c in own.items()}


def _middle(arrays: list[Array], hostile: int) -> Array:
    """Return the mean of what is left of each number without the smallest and the largest."""
    cut = min(hostile, (len(arrays) - 1) // 2)
    ordered = np.sort(np.stack(arrays).astype(np.float64), axis=0)
    found: Array = ordered[cut : len(arrays) - cut].mean(axis=0)
    return found
