"""Losses of a causal LM and of a classifier, as sums per sequence; used by whoever has the tail.

A causal LM's tail runs only at the positions that have a target, some of them at a time, and their
gradient is found beside their loss: at no time are there logits of all tokens. Knows no wave, no
optimizer and no network; docs/method.md, Tail.

Legend: B sequences, T positions, D hidden size, V vocabulary or classes, N targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from edge_sdk.model.partition import Slice
from profiler.estimate.sizes import targets_at_once

IGNORED = -100
# Parts in which a piece's loss is computed.
LOSS_PARTS = 8
# Largest relative difference of the logits of a head that counts as the plain one.
PLAIN_BOUND = 1e-5
PLAIN_STATES = 4

_plain_heads: WeakKeyDictionary[Slice, PlainHead | None] = WeakKeyDictionary()
"""What `find_plain_head` has found."""
Fused = Callable[..., Any]
"""Liger's `liger_fused_linear_cross_entropy`, or what computes the same."""


class LossSums(NamedTuple):
    """Loss of each sequence, summed over its targets."""

    loss_B: torch.Tensor
    """Differentiable."""
    targets_B: torch.Tensor
    correct_B: torch.Tensor
    """Targets whose most likely prediction is right; 0 where a fused kernel has trained."""


def loss_sums(logits: torch.Tensor, labels: torch.Tensor) -> LossSums:
    """Return the cross-entropy of *logits* (B, T, V) by next label, or (B, V) by class.

    Args:
        logits: What the model predicts.
        labels: (B, T) with -100 where no loss is taken, shifted by one here; or (B,) classes.
    """
    if labels.dim() == 1:
        loss_B = F.cross_entropy(logits.float(), labels, reduction="none")
        return LossSums(loss_B, torch.ones_like(labels), (logits.argmax(-1) == labels).long())
    labels_BT = _shifted(labels)
    # Only where there is a target: prompts cost no softmax over the vocabulary.
    where = _targets(labels_BT)
    logits_NV, labels_N = logits[where].float(), labels_BT[where]
    loss_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    return _by_row(loss_N, logits_NV.argmax(-1) == labels_N, where[0], len(labels_BT))


def target_sums(
    slice_: Slice,
    hidden_BTD: torch.Tensor,
    labels_BT: torch.Tensor,
    unit_B: torch.Tensor | None = None,
) -> LossSums:
    """Return the loss of a causal LM's final hidden state; its tail runs at the targets only.

    Args:
        slice_: Has the tail; its `has_local_tail` is true.
        hidden_BTD: State after the last block.
        labels_BT: -100 where no loss is taken; shifted by one here.
        unit_B: What each row's loss will be multiplied by before the backward pass; float16 has no
            room for a gradient that is divided only then. None: 1.
    """
    next_BT = _shifted(labels_BT)
    where = _targets(next_BT)
    hidden_ND, labels_N = hidden_BTD[where], next_BT[where]
    fused = _fused_loss(slice_, hidden_ND) if hidden_ND.requires_grad else None
    if fused is not None:
        loss_N, is_correct_N = fused(hidden_ND, labels_N), torch.zeros_like(labels_N)
        return _by_row(loss_N, is_correct_N, where[0], len(next_BT))
    unit_N = torch.ones(len(labels_N), device=labels_N.device)
    if unit_B is not None:
        unit_N = unit_B[where[0]]
    found: Any = _PositionLoss.apply(hidden_ND, labels_N, unit_N, slice_)  # type: ignore[no-untyped-call]
    loss_N, is_correct_N = found
    return _by_row(loss_N, is_correct_N, where[0], len(next_BT))


def whole_sums(
    slice_: Slice,
    ids_BT: torch.Tensor,
    lengths_B: torch.Tensor,
    labels: torch.Tensor,
    unit_B: torch.Tensor | None = None,
) -> LossSums:
    """Return the loss of token ids through a whole model; see `target_sums`."""
    if not slice_.has_local_tail:
        return loss_sums(slice_.whole(ids_BT, lengths_B), labels)
    hidden_BTD = slice_.front(ids_BT, lengths_B, slice_.layout.num_blocks)
    return target_sums(slice_, hidden_BTD, labels, unit_B)


def _shifted(labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts: that of the next one.

    The labels are shifted, not the logits: a slice of these would be copied in the backward pass.
    """
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def _targets(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and position of every target.

    Asked for once: a GPU has to be waited for until it has counted them.
    """
    rows_N, positions_N = (labels_BT != IGNORED).nonzero(as_tuple=True)
    return rows_N, positions_N


def _by_row(
    loss_N: torch.Tensor, is_correct_N: torch.Tensor, rows_N: torch.Tensor, num_rows: int
) -> LossSums:
    """Add up what was found at the targets, row by row."""
    zeros_B = torch.zeros(num_rows, dtype=torch.long, device=rows_N.device)
    return LossSums(
        loss_N.new_zeros(num_rows).index_add(0, rows_N, loss_N),
        zeros_B.index_add(0, rows_N, torch.ones_like(rows_N)),
        zeros_B.index_add(0, rows_N, is_correct_N.long()),
    )


class _PositionLoss(torch.autograd.Function):
    """Cross-entropy of each target; its gradient by the hidden state is computed at once.

    The tail looks at one position at a time and nothing of it is trained: a target's gradient
    depends on no other, and what comes from above only multiplies it. So nothing as large as logits
    is kept for the backward pass, and no product is computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        labels_N: torch.Tensor,
        unit_N: torch.Tensor,
        slice_: Slice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each target, and whether the most likely prediction is right."""
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        losses, hits = [], []
        size = targets_at_once(slice_.vocab_size)
        # At least once: of no targets there is an empty loss.
        for first in range(0, max(1, len(labels_N)), size):
            part = slice(first, first + size)
            into = None if grad_ND is None else grad_ND[part]
            found = _some(slice_, hidden_ND[part], labels_N[part], unit_N[part], into)
            losses.append(found[0])
            hits.append(found[1])
        ctx.save_for_backward(grad_ND, unit_N)
        is_correct_N = torch.cat(hits)
        ctx.mark_non_differentiable(is_correct_N)
        return torch.cat(losses), is_correct_N

    @staticmethod
    def backward(ctx: Any, above_N: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None]:
        """Return dL/dh; what was computed with is that times `unit_N`."""
        grad_ND, unit_N = ctx.saved_tensors
        factor_N = above_N / unit_N
        return grad_ND * factor_N[:, None].to(grad_ND.dtype), None, None, None


def _some(
    slice_: Slice,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    unit_N: torch.Tensor,
    grad_ND: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss, and whether it is right, of a few targets.

    Into *grad_ND*, where there is one, goes the gradient of the loss times *unit_N*.
    """
    wants_gradient = grad_ND is not None
    entered_ND = hidden_ND.detach().requires_grad_(wants_gradient)
    with torch.set_grad_enabled(wants_gradient):
        logits_NV = slice_.at_positions(entered_ND)
    given_NV = logits_NV.detach()
    dlogits_NV = torch.empty_like(given_NV) if wants_gradient else None
    losses = []
    # What cross-entropy takes on its way is as large as the logits, several times.
    size = max(1, math.ceil(len(labels_N) / LOSS_PARTS))
    for first in range(0, max(1, len(labels_N)), size):
        part = slice(first, first + size)
        with torch.set_grad_enabled(wants_gradient):
            own_NV = given_NV[part].float().requires_grad_(wants_gradient)
            loss_N = F.cross_entropy(own_NV, labels_N[part], reduction="none")
        if dlogits_NV is not None:
            dlogits_NV[part] = torch.autograd.grad(loss_N, own_NV, unit_N[part])[0]
        losses.append(loss_N.detach())
    is_correct_N = given_NV.argmax(-1) == labels_N
    if grad_ND is not None:
        grad_ND.copy_(torch.autograd.grad(logits_NV, entered_ND, dlogits_NV)[0])
    return torch.cat(losses), is_correct_N


# ---- fused, on CUDA ----


class PlainHead(NamedTuple):
    """A head whose logits are `W x + b`, perhaps softly capped, and nothing else."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None

    def logits(self, entered_ND: torch.Tensor) -> torch.Tensor:
        """Return (N, V) for what enters the head."""
        logits_NV = F.linear(entered_ND, self.weight, self.bias)
        if self.softcap is None:
            return logits_NV
        return torch.tanh(logits_NV / self.softcap) * self.softcap


def fits_fused(device: torch.device, compute: torch.dtype, *, is_installed: bool) -> bool:
    """Return whether Liger's kernel is to be used where the head is plain.

    Not in float16: the kernel's gradient is of a loss that is scaled only afterwards, and most
    probabilities of a large vocabulary are below what float16 can hold.
    """
    return is_installed and device.type == "cuda" and compute != torch.float16


def fused_loss(
    fused: Fused, slice_: Slice, head: PlainHead, hidden_ND: torch.Tensor, labels_N: torch.Tensor
) -> torch.Tensor:
    """Return the loss (N,) of each target by a fused linear cross-entropy."""
    entered_ND = slice_.before_head(hidden_ND).to(head.weight.dtype)
    # None reduced: jobs of a wave are weighted differently.
    loss_N: torch.Tensor = fused(
        entered_ND,
        head.weight,
        labels_N,
        bias=head.bias,
        reduction="none",
        softcap=head.softcap,
    )
    return loss_N


def find_plain_head(slice_: Slice) -> PlainHead | None:
    """Return the model's head if its logits are plain, by a few states; None if they are not."""
    head = slice_.head
    if type(head) is not nn.Linear:
        return None
    plain = PlainHead(head.weight, head.bias, slice_.softcap)
    states_ND = slice_.some_states(PLAIN_STATES, 1)[:, 0]
    with slice_.plainly():
        wanted = slice_.at_positions(states_ND).float()
        difference = plain.logits(slice_.before_head(states_ND)).float() - wanted
    return plain if difference.norm() <= PLAIN_BOUND * wanted.norm() else None


def _fused_loss(
    slice_: Slice, hidden_ND: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return Liger's way to the loss of *slice_*; None where the one in pieces is to be taken."""
    device = hidden_ND.device
    kind = device.type
    is_cast = torch.is_autocast_enabled(kind)
    compute = torch.get_autocast_dtype(kind) if is_cast else slice_.dtype
    if not fits_fused(device, compute, is_installed=_has_liger()):
        return None
    if slice_ not in _plain_heads:
        _plain_heads[slice_] = find_plain_head(slice_)
    head = _plain_heads[slice_]
    return None if head is None else partial(fused_loss, _liger(), slice_, head)


@cache
def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None


def _liger() -> Fused:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,unused-ignore]
        liger_fused_linear_cross_entropy,
    )

    found: Fused = liger_fused_linear_cross_entropy
    return found
