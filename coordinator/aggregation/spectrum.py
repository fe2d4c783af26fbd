"""How the energy of dW is spread over its singular values: does it collapse into the first few?

Energy is the square of a singular value; that of a matrix is its squared Frobenius norm. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_sdk.lora.factors import Factors, singular_values


def energy_within(totals: Iterable[Factors]) -> list[float]:
    """Return the share of all energy in the 1, 2, 4, 8, ... largest singular values of each weight.

    The list ends where all weights have no further ones, with 1. Weights count by their energy, and
    experts of one weight as weights of their own. It is empty where nothing was learned.
    """
    energies = [singular_values(factors) ** 2 for factors in totals if factors.rank]
    whole = sum(float(each.sum()) for each in energies)
    if not whole > 0:
        return []
    most, found, rank = max(each.shape[-1] for each in energies), [], 1
    while True:
        found.append(sum(float(each[..., :rank].sum()) for each in energies) / whole)
        if rank >= most:
            return found
        rank *= 2
