"""The trained adapters and frozen residuals of a device without torch: arrays by name.

What `adapters.Adapters` is to torch, with the same names. Knows no model and no optimizer.

Legend: R rank, I inputs, O outputs, S rank of the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.factors import Array, Factors, zero, zero_like
from edge_sdk.lora.targets import LoraConfig, Shape


class NumpyAdapters:
    """Factors A and B of every weight of a plan, and the residuals U V beside them.

    Args:
        shapes: Every weight that may have an adapter or a residual.
        ranks: Rank of each; 0 stands for none.
        alphas: LoRA alpha of each; the config's where it is not named.
        lora: LoRA configuration of the run.
        seed: Seed of the initial factors.
        fold: Takes each new residual in where weights hold theirs; None where they stand beside.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        lora: LoraConfig,
        seed: int,
        *,
        fold: Callable[[str, Factors], None] | None = None,
    ) -> None:
        self._fold = fold
        self.shapes, self._lora = dict(shapes), lora
        self.ranks = {name: rank for name, rank in ranks.items() if rank > 0}
        self.alphas = {name: alphas.get(name, lora.alpha_of(name)) for name in self.ranks}
        self.residual: dict[str, Factors] = {}
        self.parameters: dict[str, Array] = {}
        """The trained factors, as `<weight>.A` and `<weight>.B`; changed in place."""
        for name, rank in self.ranks.items():
            pair = initial_pair(name, rank, self.shapes[name], seed)
            self.parameters |= {f"{name}.A": pair.a_RI, f"{name}.B": pair.b_OR}

    def scale(self, name: str, rank: int | None = None) -> float:
        """Return the factor in front of the B A of weight *name*, if it had *rank*."""
        rank, alpha = rank or self.ranks[name], self.alphas[name]
        return alpha / float(np.sqrt(rank)) if self._lora.use_rslora else alpha / rank

    def pairs(self) -> dict[str, Pair]:
        """Return copies of the trained factors."""
        values = self.parameters
        return {n: Pair(values[f"{n}.A"].copy(), values[f"{n}.B"].copy()) for n in self.ranks}

    def load_pairs(self, pairs: Mapping[str, Pair]) -> None:
        """Overwrite trained factors in place."""
        for name, pair in pairs.items():
            self.parameters[f"{name}.A"][...] = pair.a_RI
            self.parameters[f"{name}.B"][...] = pair.b_OR

    def product(self, name: str) -> Factors:
        """Return what the trained adapter adds to its weight: s B A, scale inside."""
        a_RI, b_OR = self.parameters[f"{name}.A"], self.parameters[f"{name}.B"]
        return Factors(b_OR * np.float32(self.scale(name)), a_RI.copy())

    def products(self) -> dict[str, Factors]:
        """Return what every trained adapter adds to its weight."""
        return {name: self.product(name) for name in self.ranks}

    def set_residual(self, residual: Mapping[str, Factors]) -> None:
        """Replace the frozen residual of the named weights; absent names keep theirs."""
        new = {n: f for n, f in residual.items() if f.rank or n in self.residual}
        self.residual |= {n: Factors(*map(_float32, f)) for n, f in new.items()}
        for name in new if self._fold else ():
            assert self._fold is not None
            self._fold(name, self.residual[name])

    def zero_residual(self) -> dict[str, Factors]:
        """Return a residual of rank 0 for every weight that has one now."""
        return {n: zero_like(f) for n, f in self.residual.items()}

    def factors(self, name: str) -> dict[str, Array]:
        """Return what weight *name* computes with: A, s B, V, U; a rank of 0 becomes one of zeros.

        Zeros change nothing, and not every kernel takes a matrix without rows.
        """
        own = self.product(name) if name in self.ranks else None
        found: dict[str, Array] = {}
        for (down, up), held in (("AB", own), ("VU", self.residual.get(name))):
            pair = held if held is not None and held.rank else _one_of_zeros(self.shapes[name])
            found |= {down: pair.a_RI, up: pair.b_OR}
        return found


def _one_of_zeros(shape: Shape) -> Factors:
    return zero_like(zero(*shape), 1)


def _float32(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=np.float32)
