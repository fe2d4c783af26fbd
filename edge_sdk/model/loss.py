"""Losses of a causal LM and of a classifier, as sums per sequence; used by whoever has the tail.

Legend: B sequences, T positions, V vocabulary or classes, N targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

IGNORED = -100


class LossSums(NamedTuple):
    """Loss of each sequence, summed over its targets."""

    loss_B: torch.Tensor
    """Differentiable."""
    targets_B: torch.Tensor
    correct_B: torch.Tensor
    """Targets whose most likely prediction is right."""


def loss_sums(logits: torch.Tensor, labels: torch.Tensor) -> LossSums:
    """Return the cross-entropy of *logits* (B, T, V) by next label, or (B, V) by class.

    Args:
        logits: What the model predicts.
        labels: (B, T) with -100 where no loss is taken, shifted by one here; or (B,) classes.
    """
    if labels.dim() == 1:
        loss_B = F.cross_entropy(logits.float(), labels, reduction="none")
        return LossSums(loss_B, torch.ones_like(labels), (logits.argmax(-1) == labels).long())
    # The labels are shifted, not the logits: a slice of these would be copied in the backward pass.
    labels_BT = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    is_target_BT = labels_BT != IGNORED
    # Only where there is a target: prompts cost no softmax over the vocabulary.
    logits_NV = logits[is_target_BT].float()
    labels_N = labels_BT[is_target_BT]
    rows_N = is_target_BT.nonzero()[:, 0]
    loss_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    correct_N = (logits_NV.argmax(-1) == labels_N).long()
    num_rows = labels.shape[0]
    zeros_B = torch.zeros(num_rows, dtype=torch.long, device=labels.device)
    return LossSums(
        loss_N.new_zeros(num_rows).index_add(0, rows_N, loss_N),
        is_target_BT.sum(1),
        zeros_B.index_add(0, rows_N, correct_N),
    )
