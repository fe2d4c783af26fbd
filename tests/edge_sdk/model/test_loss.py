"""Losses are those of transformers' own heads, cut into sequences."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from edge_sdk.model.loss import IGNORED, loss_sums


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of three sequences, one of which has no target."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 11, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, :3] = IGNORED
    labels[1] = IGNORED
    labels[2, 4:] = IGNORED
    return logits, labels


def test_a_language_model_predicts_the_next_token() -> None:
    """Sums over a sequence's targets equal cross-entropy of the labels shifted by one."""
    logits, labels = random_case()

    sums = loss_sums(logits, labels)

    assert sums.targets_B.tolist() == [3, 0, 3]
    for row in range(3):
        expected = F.cross_entropy(logits[row, :-1], labels[row, 1:], reduction="sum")
        torch.testing.assert_close(sums.loss_B[row], expected)
        is_target = labels[row, 1:] != IGNORED
        right = (logits[row, :-1].argmax(-1) == labels[row, 1:]) & is_target
        assert int(sums.correct_B[row]) == int(right.sum())


def test_gradients_reach_targets_only() -> None:
    """The gradient is that of cross-entropy; where there is no target it is zero."""
    logits, labels = random_case()
    reference = logits.detach().clone().requires_grad_(True)
    shifted = labels[:, 1:].flatten()

    loss_sums(logits, labels).loss_B.sum().backward()
    F.cross_entropy(reference[:, :-1].flatten(0, 1), shifted, reduction="sum").backward()

    assert logits.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(logits.grad, reference.grad)
    assert not logits.grad[1].any()


def test_a_batch_without_targets_has_no_loss() -> None:
    """Zero, not NaN, and still differentiable."""
    logits, labels = random_case()

    sums = loss_sums(logits, torch.full_like(labels, IGNORED))
    sums.loss_B.sum().backward()

    assert sums.loss_B.tolist() == [0.0, 0.0, 0.0]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_classifier_has_one_target_a_sequence() -> None:
    """Each sequence counts once."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 0, 0])

    sums = loss_sums(logits, labels)

    torch.testing.assert_close(sums.loss_B, F.cross_entropy(logits, labels, reduction="none"))
    assert (sums.targets_B.tolist(), sums.correct_B.tolist()) == ([1, 1, 1], [1, 0, 1])


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 5)])
def test_sums_are_taken_in_float32(shape: tuple[int, ...]) -> None:
    """Half-precision logits lose nothing more on their way to the loss."""
    logits = torch.randn(shape).bfloat16()
    labels = torch.ones(shape[:-1], dtype=torch.long)

    assert torch.equal(loss_sums(logits, labels).loss_B, loss_sums(logits.float(), labels).loss_B)
    assert loss_sums(logits, labels).loss_B.dtype == torch.float32
