"""Join what devices and coordinator learned in a round; docs/method.md, Aggregation. Pure.

Target, with the scale always inside: dW* = sum_i p_i s_i B_i A_i. A weight of block l is trained by
the devices with split > l and, for everybody else's samples, by the coordinator's own adapter with
the sum of their shares: each sample counts once in every block, wherever the block was trained.

Participants are summed in the order of their names: float addition is not associative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors, compress, norm, stack, zero
from edge_sdk.lora.targets import Shape

SERVER = ""
"""The coordinator's own name among the participants; sorts before every device."""


@dataclass(frozen=True)
class Contribution:
    """One participant's adapter of one weight at the start and at the end of a round."""

    share: float
    """Part of the round's samples that this adapter was trained on; shares sum to 1."""
    scale: float
    before: Pair
    after: Pair
    freshness: float = 1.0
    """How much of what it has learned counts: less than 1 where it began from an old dW."""
    device: str = ""
    """Whose it is; one device may bring several where nobody waits for anybody."""


@dataclass(frozen=True)
class Update:
    """What the round does to one weight: a new dW, or what is added to it, or both."""

    total: Factors | None = None
    """The new dW, where the rule replaces it; its columns stand in the order of importance."""
    change: Factors | None = None
    """What is added to dW; where it is left out, what is new in `total`."""
    shared: Factors | None = None
    """Factors that everybody goes on with, scale inside, of the largest rank; a participant of a
    smaller one takes their first ranks. Only where they are not those of `total`."""
    cut_error: float = 0.0
    """Share of the change, in Frobenius norm, that a rank cap has cut."""


Join = Callable[[Mapping[str, Contribution], Shape, int | None], Update]
Memory = Mapping[str, Array]
ServerOptimizer = Callable[[Factors, Memory], tuple[Factors, Memory]]


@dataclass(frozen=True)
class Rule:
    """One way to join adapters and to hand the result out again."""

    join: Join
    redistribute: Callable[[Factors, Pair, float], Pair] | None = None
    """(`shared`, else dW; a fresh pair, its scale) -> what a participant of that rank holds next.
    None: everybody keeps their own factors, or begins anew."""
    has_residual: bool = True
    """Whether a frozen residual completes own factors to dW, or they stand for dW themselves."""
    restarts: bool = False
    """Whether everybody begins the next round with fresh factors and a fresh optimizer."""
    bounds_rank: bool = False
    """Whether dW keeps no more ranks than `max_rank`, or than the adapters of a round have
    together, and the rule gives its change as it is; else `max_rank` is one of the change."""
    needs_equal_ranks: bool = False
    """Whether a weight must have the same rank wherever it is trained."""
    needs_whole_model: bool = False
    """Whether every device must hold all blocks: the rule does not weigh by samples, so it cannot
    join what devices and coordinator learned from different shares of them."""
    is_additive: bool = False
    """Whether progress may be added to dW whenever it comes, against the dW that it began from."""
    can_prune: bool = False
    """Whether devices may cut ranks off during the run (`training.rank_penalty`)."""
    server_learning_rate: float = 1.0
    """How much of the way that a round's adapters have gone counts, of weights that more than one
    participant trains: FedOpt's server learning rate (arXiv 2003.00295)."""
    server_optimizer: ServerOptimizer | None = None
    """(a round's change of dW of one weight, what was remembered of that weight) -> the change to
    apply, what to remember: server momentum and adaptive server optimizers (FedOpt, arXiv
    2003.00295). The first memory is empty; checkpoints hold it. None: the change is applied."""


def fedavg(
    contributions: Mapping[str, Contribution], _shape: Shape, _max_rank: int | None
) -> Update:
    """Take the mean of A and the mean of B separately, of equal ranks (SplitLoRA eq. 8-9)."""
    ranks = {name: c.after.a_RI.shape[-2] for name, c in contributions.items()}
    if len(set(ranks.values())) > 1:
        raise ConfigError(
            f"aggregation 'fedavg' needs equal ranks, got {sorted(set(ranks.values()))}; "
            "use 'fedex'"
        )
    return Update(total=_mean_of_padded(contributions, shares(contributions)))


def zeropad(
    contributions: Mapping[str, Contribution], _shape: Shape, _max_rank: int | None
) -> Update:
    """Pad to the largest rank, then average A and B separately (HetLoRA, arXiv 2401.06432, 3.2).

    Weights are the paper's: |dW_k|_F / sum_j |dW_j|_F, so that sparse adapters count less; samples
    do not count. The scale is inside dW_k and B_k (the paper has none).
    """
    size = {n: norm(product(c.after, c.scale)) for n, c in contributions.items()}
    total = sum(size[n] for n in sorted(size))
    weight = {n: s / total for n, s in size.items()} if total > 0 else shares(contributions)
    return Update(total=_mean_of_padded(contributions, weight))


def svd(contributions: Mapping[str, Contribution], shape: Shape, max_rank: int | None) -> Update:
    """Make dW = sum_i p_i s_i B_i A_i, to be handed out as its best approximation of each rank.

    HLoRA (arXiv 2503.00813) and FlexLoRA (2402.11505); a QR and a small SVD, no dense matrix.
    """
    total, error = compress(_weighted_sum(contributions, shape), max_rank)
    return Update(total=total, cut_error=error)


def exact(contributions: Mapping[str, Contribution], shape: Shape, max_rank: int | None) -> Update:
    """Add everybody's progress to dW and leave the factors alone.

    dW <- dW + sum_i p_i (s_i B_i' A_i' - s_i B_i A_i), as stacked factors that are compressed. It
    serves `stack`, too (HSplitLoRA's NAA, FLoRA 2409.05976), where every round starts from B = 0.
    """
    change, error = compress(_progress(contributions, shape), max_rank)
    return Update(change=change, cut_error=error)


def fedex(contributions: Mapping[str, Contribution], shape: Shape, _max_rank: int | None) -> Update:
    """Add everybody's progress to dW as `exact` does, and go on with the means of the factors.

    FedEx-LoRA (arXiv 2410.09432), whose residual is the mean of the products less the product of
    the means; here for any ranks. Each rank is the mean over those that train it: a rank that few
    have is not made small by the others, and the residual completes whatever the means miss.
    """
    change = _progress(contributions, shape)
    return Update(change=change, shared=_mean_of_ranks(contributions))


def scaled_back(contribution: Contribution, part: float) -> Contribution:
    """Return a contribution whose factors have gone *part* of their way."""
    before, after = contribution.before, contribution.after
    a_RI, b_OR = (
        (old + part * (new.astype(np.float64) - old)).astype(np.float32)
        for old, new in zip(before, after, strict=True)
    )
    return replace(contribution, after=Pair(a_RI, b_OR))


def slowed(contributions: Mapping[str, Contribution], rate: float) -> Mapping[str, Contribution]:
    """Return one weight's contributions at a server learning rate.

    What one participant alone has trained is no mean of several, and stays as it is.
    """
    if rate == 1.0 or len(contributions) < 2:
        return contributions
    return {name: scaled_back(c, rate) for name, c in contributions.items()}


def _weighted_sum(contributions: Mapping[str, Contribution], shape: Shape) -> Factors:
    """Return the stacked factors of sum_i p_i s_i B_i A_i, less of it where it is not fresh."""
    weight = shares(contributions)
    ordered = [(weight[n], contributions[n]) for n in sorted(contributions)]
    parts = [product(c.after, share * c.freshness * c.scale) for share, c in ordered]
    return stack([zero(*shape), *parts])


def _progress(contributions: Mapping[str, Contribution], shape: Shape) -> Factors:
    """Return sum_i p_i (s_i B_i' A_i' - s_i B_i A_i), stacked; equal beginnings are one term."""
    weight = shares(contributions)
    found: dict[tuple[bytes, bytes], tuple[Pair, float]] = {}
    for name in sorted(contributions):
        c = contributions[name]
        if c.before.b_OR.any():
            key = c.before.a_RI.tobytes(), c.before.b_OR.tobytes()
            part = weight[name] * c.freshness * c.scale
            found[key] = c.before, part + (found[key][1] if key in found else 0.0)
    before = [product(pair, -sum_) for pair, sum_ in found.values()]
    return stack([_weighted_sum(contributions, shape), *before])


def _mean_of_padded(
    contributions: Mapping[str, Contribution], weight: Mapping[str, float]
) -> Factors:
    """Return weighted means of all s B and of all A, padded with zeros to the largest rank."""
    rank = max(c.after.a_RI.shape[-2] for c in contributions.values())
    rows, columns = {}, {}
    for name, c in contributions.items():
        rows[name] = _padded(c.after.a_RI, -2, rank)
        columns[name] = _padded(c.after.b_OR * c.scale, -1, rank)
    return Factors(mean_of(columns, weight), mean_of(rows, weight))


def _mean_of_ranks(contributions: Mapping[str, Contribution]) -> Factors:
    """Return the means of all s B and of all A, each rank over those that have it."""
    weight = shares(contributions)
    ranks = sorted({c.after.a_RI.shape[-2] for c in contributions.values()})
    rows, columns = [], []
    for first, end in pairwise([0, *ranks]):
        having = {n: c for n, c in contributions.items() if c.after.a_RI.shape[-2] >= end}
        total = sum(weight[name] for name in sorted(having))
        part = {name: weight[name] / total for name in having}
        rows.append(mean_of({n: c.after.a_RI[..., first:end, :] for n, c in having.items()}, part))
        columns.append(
            mean_of({n: c.after.b_OR[..., first:end] * c.scale for n, c in having.items()}, part)
        )
    return Factors(np.concatenate(columns, axis=-1), np.concatenate(rows, axis=-2))


def _padded(array: Array, axis: int, size: int) -> Array:
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, size - array.shape[axis])
    return np.pad(array, missing)


def truncate(given: Factors, fresh: Pair, scale: float) -> Pair:
    """Take the first rows of A and columns of B; ranks that are not given are fresh."""
    return _fill(given.a_RI, given.b_OR / scale, fresh)


def svd_asymmetric(total: Factors, fresh: Pair, scale: float) -> Pair:
    """Take the largest singular values of dW; rows of A keep the length they are drawn with.

    The rest is in B. With the norms shared equally, B and A are so small in the first rounds that
    AdamW's steps and their own gradients do not fit them; docs/aggregation.md has measurements.
    """
    length_R = np.maximum(np.linalg.norm(total.a_RI, axis=-1), np.finfo(np.float32).tiny)
    drawn = 1.0 / np.sqrt(3.0)  # expected norm of a row of `initial_pair`
    a_RI = total.a_RI * (drawn / length_R)[..., :, None].astype(np.float32)
    b_OR = total.b_OR * (length_R / (drawn * scale))[..., None, :].astype(np.float32)
    return _fill(a_RI, b_OR, fresh)


def balanced(total: Factors, fresh: Pair, scale: float) -> Pair:
    """Take the largest singular values of dW; B and A have equal norms."""
    root = np.float32(np.sqrt(scale))
    return _fill(total.a_RI / root, total.b_OR / root, fresh)


def _fill(a_RI: Array, b_OR: Array, fresh: Pair) -> Pair:
    """Return as many ranks as *fresh* has: first the given ones, then fresh ones, whose B is 0."""
    rank, given = fresh.a_RI.shape[-2], a_RI.shape[-2]
    a = np.concatenate([a_RI[..., :rank, :], fresh.a_RI[..., given:, :]], axis=-2)
    b = np.concatenate([b_OR[..., :rank], fresh.b_OR[..., given:]], axis=-1)
    return Pair(a.astype(np.float32), b.astype(np.float32))


RULES: dict[str, Rule] = {
    "fedex": Rule(fedex, truncate, bounds_rank=True),
    "exact": Rule(exact, is_additive=True),
    "stack": Rule(exact, restarts=True),
    "svd": Rule(svd, svd_asymmetric, has_residual=False),
    "svd-balanced": Rule(svd, balanced, has_residual=False),
    "zeropad": Rule(zeropad, truncate, has_residual=False, needs_whole_model=True, can_prune=True),
    "fedavg": Rule(fedavg, truncate, has_residual=False, needs_equal_ranks=True),
}


def shares(contributions: Mapping[str, Contribution]) -> dict[str, float]:
    """Return the participants' shares, scaled to sum to 1 where some did not report."""
    total = sum(contributions[name].share for name in sorted(contributions))
    return {name: c.share / total for name, c in contributions.items()}


def mean_of(values: Mapping[str, Array], weight: Mapping[str, float]) -> Array:
    """Return the weighted mean, summed in float64 in the order of the names."""
    total = sum(values[name].astype(np.float64) * weight[name] for name in sorted(values))
    return np.asarray(total, dtype=np.float64).astype(np.float32)


def product(pair: Pair, scale: float) -> Factors:
    """Return the matrix s B A as factors."""
    return Factors(pair.b_OR * np.float32(scale), pair.a_RI)


def resize_pair(pair: Pair, fresh: Pair, ratio: float) -> Pair:
    """Return a pair of as many ranks as *fresh* has; if not fewer than before, s B A is the same.

    The first ranks stay as they are, so that an optimizer's moments keep their meaning. The
    residual holds what a smaller rank loses.

    Args:
        pair: The factors until now.
        fresh: Factors of the new rank as they would be drawn.
        ratio: Old scale / new scale.
    """
    return _fill(pair.a_RI, pair.b_OR * np.float32(ratio), fresh)


def residual(total: Factors, own: Factors | None) -> Factors:
    """Return what a participant must add to its own adapter to have dW: dW - s B A."""
    if own is None:
        return total
    return compress(stack([total, own.scaled(-1.0)]), cancels=True)[0]
