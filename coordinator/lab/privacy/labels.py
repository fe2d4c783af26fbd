"""Targets from the gradient that a device with `labels: device` sends; docs/security.md, formula.

The gradient of the loss by the state after the last block is `J^T W^T (softmax(z) - onehot(y)) / n`
at each position: head W, logits z and Jacobian J of what lies before the head follow from the model
and the state, n is told. Whoever has them tries each y and takes the one whose gradient is nearest.

Legend: B sequences, T positions, D hidden size, E width of what enters the head, W wanted
positions, V vocabulary or classes, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from coordinator.lab.privacy.states import Array, as_read
from coordinator.lab.privacy.texts import Numbers
from edge_sdk.data.batches import MicroBatch
from edge_sdk.data.encoding import IGNORE
from edge_sdk.model.loss import PlainHead, find_plain_head, loss_sums, target_sums
from edge_sdk.model.partition import Slice
from edge_sdk.protocol.residual import TOP_GRADIENT, WHOLE, plain

# Positions whose Jacobians are held at the same time.
POSITIONS = 32
# Candidates of which the gradient is computed; of larger vocabularies those that fit best roughly.
MOST_TRIED = 4096


class Sent(NamedTuple):
    """What travels of the top of a micro-batch, as the other side reads it."""

    hidden: Array
    """States after the last block: of the wanted positions (W, D), or of all (B, T, D)."""
    grad: Array
    """Gradient of the loss by them."""
    labels: Numbers
    """What is to be found: (W,), or (B,)."""
    num_targets: int
    """Divisor of the loss."""


def send_top(model: Slice, hidden_BTD: Array, batch: MicroBatch, codec: str) -> Sent:
    """Return what device and coordinator exchange at the top of one micro-batch."""
    seen = as_read(hidden_BTD, plain(codec, WHOLE))
    labels = torch.from_numpy(batch.labels)
    wanted_BT = batch.predicts if model.has_local_tail else None
    if wanted_BT is not None:
        seen = np.zeros_like(hidden_BTD)
        seen[wanted_BT] = as_read(hidden_BTD[wanted_BT], plain(codec, WHOLE))
    entered = torch.from_numpy(seen).requires_grad_(True)
    lengths_B = torch.from_numpy(batch.lengths)
    if wanted_BT is None:
        pooled_B = None if batch.pooled is None else torch.from_numpy(batch.pooled)
        sums = loss_sums(model.logits(entered, lengths_B, len(model.blocks), pooled_B), labels)
    else:
        sums = target_sums(model, entered, labels)
    torch.autograd.backward(sums.loss_B.sum() / batch.num_targets)
    assert entered.grad is not None
    grad = entered.grad.numpy()
    if wanted_BT is not None:
        seen, grad = seen[wanted_BT], grad[wanted_BT]
    found = batch.labels if batch.labels.ndim == 1 else batch.labels[:, 1:][_is_target(batch)]
    return Sent(seen, as_read(grad, plain(codec, TOP_GRADIENT)), found, batch.num_targets)


def _is_target(batch: MicroBatch) -> np.ndarray:
    found: np.ndarray = batch.labels[:, 1:] != IGNORE
    return found


def find_labels(model: Slice, sent: Sent, batch: MicroBatch) -> Numbers | None:
    """Return how many labels fit a gradient as well as the true one, or better; None: not tried."""
    head = find_plain_head(model) if model.has_local_tail else None
    if head is not None and sent.hidden.ndim == 2:
        ranks = [_of_some(model, head, part) for part in _parts(sent)]
        return np.concatenate(ranks)
    return _by_class(model, sent, batch) if batch.labels.ndim == 1 else None


def _parts(sent: Sent) -> Iterator[Sent]:
    for first in range(0, len(sent.labels), POSITIONS):
        part = slice(first, first + POSITIONS)
        yield sent._replace(
            hidden=sent.hidden[part], grad=sent.grad[part], labels=sent.labels[part]
        )


def _of_some(model: Slice, head: PlainHead, sent: Sent) -> Numbers:
    """Try every token at a few positions; return the ranks of the true ones."""
    entered_WE, jacobian_WED = _jacobian(model, torch.from_numpy(sent.hidden))
    with torch.no_grad():
        logits_WV = head.logits(entered_WE)
        bend_WV = _bend(head, logits_WV)
        weight_VE = head.weight.float()
        expected_WE = (logits_WV.softmax(-1) * bend_WV) @ weight_VE
        # What is left of a gradient when the part is gone that does not depend on the label.
        left_WD = torch.einsum("we,wed->wd", expected_WE, jacobian_WED)
        left_WD = left_WD - torch.from_numpy(sent.grad) * sent.num_targets
        along_WV = torch.einsum("wd,wed->we", left_WD, jacobian_WED) @ weight_VE.T * bend_WV
        tried_WK = _shortlist(along_WV, bend_WV, weight_VE, jacobian_WED)
        bend_WK, along_WK = bend_WV.gather(1, tried_WK), along_WV.gather(1, tried_WK)
        norms = [
            ((weight_VE[own_K] @ jacobian_ED) ** 2).sum(1)
            for own_K, jacobian_ED in zip(tried_WK, jacobian_WED, strict=True)
        ]
        # The squared distance of each candidate's gradient from what is left, less a constant.
        misfit_WK = torch.stack(norms) * bend_WK**2 - 2.0 * along_WK
    return _ranks(misfit_WK.numpy(), tried_WK.numpy(), sent.labels, len(weight_VE))


def _jacobian(model: Slice, hidden_WD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters the head, (W, E), and its Jacobian by the state, (W, E, D)."""
    hidden_WD = hidden_WD.requires_grad_(True)
    entered_WE = model.before_head(hidden_WD)
    rows = [
        torch.autograd.grad(entered_WE[:, e].sum(), hidden_WD, retain_graph=True)[0]
        for e in range(entered_WE.shape[1])
    ]
    return entered_WE.detach(), torch.stack(rows, dim=1)


def _bend(head: PlainHead, logits_WV: torch.Tensor) -> torch.Tensor:
    """Return the derivative of each logit by what it was before it was softly capped."""
    if head.softcap is None:
        return torch.ones_like(logits_WV)
    return 1.0 - (logits_WV / head.softcap) ** 2


def _shortlist(
    along_WV: torch.Tensor,
    bend_WV: torch.Tensor,
    weight_VE: torch.Tensor,
    jacobian_WED: torch.Tensor,
) -> torch.Tensor:
    """Return the tokens to try, (W, K): all, or those that fit best if J were a multiple of 1."""
    size_W1 = (jacobian_WED**2).sum((1, 2))[:, None] / jacobian_WED.shape[1]
    rough_WV = along_WV - 0.5 * bend_WV**2 * (weight_VE**2).sum(1) * size_W1
    return rough_WV.topk(min(MOST_TRIED, len(weight_VE)), dim=1).indices


def _ranks(misfit_WK: Array, tried_WK: Numbers, labels_W: Numbers, size: int) -> Numbers:
    is_own_WK = tried_WK == labels_W[:, None]
    own_W = np.where(is_own_WK, misfit_WK, -np.inf).max(1)
    ranks_W = (misfit_WK <= own_W[:, None]).sum(1) - 1
    found: Numbers = np.where(is_own_WK.any(1), ranks_W, size)
    return found


def _by_class(model: Slice, sent: Sent, batch: MicroBatch) -> Numbers:
    """Try every class of every sequence, each with a backward pass."""
    hidden_BTD = torch.from_numpy(sent.hidden).requires_grad_(True)
    pooled_B = None if batch.pooled is None else torch.from_numpy(batch.pooled)
    logits_BC = model.logits(
        hidden_BTD, torch.from_numpy(batch.lengths), len(model.blocks), pooled_B
    )
    misfits = []
    for number in range(logits_BC.shape[1]):
        labels_B = torch.full((len(logits_BC),), number)
        loss = F.cross_entropy(logits_BC, labels_B, reduction="sum") / sent.num_targets
        (grad_BTD,) = torch.autograd.grad(loss, hidden_BTD, retain_graph=True)
        misfits.append(((grad_BTD - torch.from_numpy(sent.grad)) ** 2).sum((1, 2)))
    misfit_BC = torch.stack(misfits, dim=1).numpy()
    tried_BC = np.broadcast_to(np.arange(misfit_BC.shape[1]), misfit_BC.shape)
    return _ranks(misfit_BC, tried_BC, sent.labels, misfit_BC.shape[1])
