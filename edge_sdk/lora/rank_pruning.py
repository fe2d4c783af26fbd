"""HetLoRA's self-pruning (arXiv 2401.06432, 3.1): tails that fade are cut off.

The device adds lambda |B_tail|_F |A_tail|_F to its loss, the tail being the ranks from r' = gamma r
on. RECONSTRUCTED: where a round of training has made that product smaller, the rank becomes r'.

Legend: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

    from edge_sdk.lora.adapters import Pair


def kept_rank(rank: int, gamma: float) -> int:
    """Return the r' of a rank; at least 1, so that no weight is lost for good."""
    return max(1, round(gamma * rank))


def add_penalty(
    parameters: Mapping[str, nn.Parameter], ranks: Mapping[str, int], weight: float, gamma: float
) -> None:
    """Add the gradient of the penalty to what a backward pass has left.

    Args:
        parameters: `<weight>.A` (..., R, I) and `<weight>.B` (..., O, R); a tail runs through all
            experts of a stack.
        ranks: Rank of each weight.
        weight: Lambda, times whatever the loss was multiplied with.
        gamma: Share of the ranks before the tail.
    """
    import torch

    with torch.no_grad():
        for name, rank in ranks.items():
            kept = kept_rank(rank, gamma)
            a_RI, b_OR = parameters[f"{name}.A"], parameters[f"{name}.B"]
            if kept == rank or a_RI.grad is None or b_OR.grad is None:
                continue
            tail_a, tail_b = a_RI[..., kept:, :], b_OR[..., kept:]
            norm_a, norm_b = torch.linalg.norm(tail_a), torch.linalg.norm(tail_b)
            if norm_a > 0 and norm_b > 0:
                a_RI.grad[..., kept:, :] += weight * norm_b / norm_a * tail_a
                b_OR.grad[..., kept:] += weight * norm_a / norm_b * tail_b


def penalty_gradients(pair: Pair, gamma: float) -> Pair:
    """Return what `add_penalty` adds to the gradients of A and B for lambda = 1; numpy only."""
    kept = kept_rank(pair.a_RI.shape[-2], gamma)
    grad_a, grad_b = np.zeros_like(pair.a_RI), np.zeros_like(pair.b_OR)
    tail_a, tail_b = pair.a_RI[..., kept:, :], pair.b_OR[..., kept:]
    norm_a, norm_b = np.linalg.norm(tail_a), np.linalg.norm(tail_b)
    if norm_a > 0 and norm_b > 0:
        grad_a[..., kept:, :] = norm_b / norm_a * tail_a
        grad_b[..., kept:] = norm_a / norm_b * tail_b
    return type(pair)(grad_a, grad_b)


def pruned_rank(before: Pair, after: Pair, gamma: float) -> int:
    """Return the rank of an adapter after a round of training with the penalty."""
    rank = after.a_RI.shape[-2]
    kept = kept_rank(rank, gamma)
    return kept if 0.0 < _tail(after, kept) < _tail(before, kept) else rank


def _tail(pair: Pair, kept: int) -> float:
    norm_b = np.linalg.norm(pair.b_OR[..., kept:])
    return float(norm_b * np.linalg.norm(pair.a_RI[..., kept:, :]))
