"""Join what devices and coordinator learned in a round; design.md 6. Pure: values in, values out.

Target, with the scale always inside: dW* = sum_i p_i s_i B_i A_i. A weight of block l is trained by
the devices with split > l and, for everybody else's samples, by the coordinator's own adapter with
the sum of their shares: each sample counts once in every block, wherever the block was trained.

Participants are summed in the order of their names: float addition is not associative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.adapters import Pair, Shape
from edge_sdk.errors import ConfigError
from edge_sdk.factors import Array, Factors, compress, stack, zero

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


@dataclass(frozen=True)
class Update:
    """What the round does to one weight."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    """New own factors by participant, where the rule replaces them."""
    change: Factors | None = None
    """What is added to dW and, less the participant's own progress, to its residual."""
    cut_error: float = 0.0
    """Share of the change, in Frobenius norm, that a rank cap has cut."""


Rule = Callable[[Mapping[str, Contribution], Shape, int | None], Update]


def fedavg(
    contributions: Mapping[str, Contribution], _shape: Shape, _max_rank: int | None
) -> Update:
    """Mean of A and mean of B, apart (SplitLoRA eq. 8-9); needs equal ranks."""
    ranks = {name: c.after.a_RI.shape[0] for name, c in contributions.items()}
    if len(set(ranks.values())) > 1:
        raise ConfigError(
            f"aggregation 'fedavg' needs equal ranks, got {sorted(set(ranks.values()))}; "
            "use 'exact'"
        )
    names = sorted(contributions)
    mean = Pair(
        mean_of({n: contributions[n].after.a_RI for n in names}, shares(contributions)),
        mean_of({n: contributions[n].after.b_OR for n in names}, shares(contributions)),
    )
    return Update(pairs=dict.fromkeys(names, mean))


def exact(contributions: Mapping[str, Contribution], shape: Shape, max_rank: int | None) -> Update:
    """Add everybody's progress to dW and leave the factors alone.

    dW <- dW + sum_i p_i (s_i B_i' A_i' - s_i B_i A_i), as stacked factors made small again.
    """
    weight = shares(contributions)
    terms = [zero(*shape)]
    for name in sorted(contributions):
        c = contributions[name]
        terms.append(Factors(c.after.b_OR, c.after.a_RI).scaled(weight[name] * c.scale))
        terms.append(Factors(c.before.b_OR, c.before.a_RI).scaled(-weight[name] * c.scale))
    change, error = compress(stack(terms), max_rank)
    return Update(change=change, cut_error=error)


RULES: dict[str, Rule] = {"exact": exact, "fedavg": fedavg}


def shares(contributions: Mapping[str, Contribution]) -> dict[str, float]:
    """The participants' shares, made to sum to 1 when some did not report."""
    total = sum(contributions[name].share for name in sorted(contributions))
    return {name: c.share / total for name, c in contributions.items()}


def mean_of(values: Mapping[str, Array], weight: Mapping[str, float]) -> Array:
    """Weighted mean in float64, summed in the order of the names."""
    total = sum(values[name].astype(np.float64) * weight[name] for name in sorted(values))
    return np.asarray(total, dtype=np.float64).astype(np.float32)


def product(pair: Pair, scale: float) -> Factors:
    """The matrix s B A as factors."""
    return Factors(pair.b_OR * scale, pair.a_RI)


def residual(total: Factors, own: Factors | None) -> Factors:
    """What a participant must add to its own adapter to have dW: dW - s B A."""
    if own is None:
        return total
    return compress(stack([total, own.scaled(-1.0)]), cancels=True)[0]
