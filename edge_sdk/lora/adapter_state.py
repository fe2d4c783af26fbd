"""What adapters and residuals become between rounds and in checkpoints, whatever computes them.

Numpy only: a device without torch uses it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors, compress, stack


class Adapted(Protocol):
    """The adapters of some weights: trained factors, and frozen residuals beside them."""

    ranks: dict[str, int]
    residual: dict[str, Factors]

    def pairs(self) -> dict[str, Pair]:
        """Copies of the trained factors."""
        ...

    def load_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Overwrite trained factors."""
        ...

    def products(self) -> dict[str, Factors]:
        """What the trained factors add to their weights, scale inside."""
        ...

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the residual of the named weights; absent names keep theirs."""
        ...

    def zero_residual(self) -> dict[str, Factors]:
        """A residual of rank 0 for every weight that has one now."""
        ...


def merge_change(
    adapters: Adapted, changes: Mapping[str, Factors], before: Mapping[str, Factors]
) -> None:
    """Res <- Res + change + s B A - s B' A' for the weights in *changes*.

    The frozen residual of docs/method.md, Aggregation. B A are the factors at the start of the
    round that ended, B' A' those that are held now.
    """
    now = adapters.products()
    merged = {}
    for name, change in changes.items():
        terms = [change]
        if name in adapters.residual:
            terms.append(adapters.residual[name])
        if name in now:
            terms += [now[name].scaled(-1.0), before[name]]
        merged[name] = compress(stack(terms), cancels=True)[0]
    adapters.set_residual(merged)


def adapter_state(adapters: Adapted) -> dict[str, np.ndarray]:
    """Own factors and residuals as flat arrays."""
    state: dict[str, np.ndarray] = {}
    for name, pair in adapters.pairs().items():
        state |= {f"own:{name}.A": pair.a_RI, f"own:{name}.B": pair.b_OR}
    for name, factors in adapters.residual.items():
        state |= {f"residual:{name}.V": factors.a_RI, f"residual:{name}.U": factors.b_OR}
    return state


def load_adapter_state(adapters: Adapted, state: Mapping[str, np.ndarray]) -> None:
    """Take over what `adapter_state` returned."""
    own = under("own:", state)
    names = [n for n in adapters.ranks if f"{n}.A" in own]
    adapters.load_pairs({n: Pair(own[f"{n}.A"], own[f"{n}.B"]) for n in names})
    adapters.set_residual({**adapters.zero_residual(), **_factors(under("residual:", state))})


def before_state(before: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """The products of the round's start as flat arrays."""
    state: dict[str, np.ndarray] = {}
    for name, factors in before.items():
        state |= {f"before:{name}.V": factors.a_RI, f"before:{name}.U": factors.b_OR}
    return state


def load_before_state(state: Mapping[str, np.ndarray]) -> dict[str, Factors]:
    """Take over what `before_state` returned."""
    return _factors(under("before:", state))


def _factors(flat: Mapping[str, np.ndarray]) -> dict[str, Factors]:
    names = [key.removesuffix(".V") for key in flat if key.endswith(".V")]
    return {n: Factors(flat[f"{n}.U"], flat[f"{n}.V"]) for n in names}


def under(prefix: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The entries whose names begin with *prefix*, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
