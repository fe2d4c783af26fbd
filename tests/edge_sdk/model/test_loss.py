"""Losses are those of transformers' own heads, cut into sequences."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from edge_sdk.model.layout import find_layout
from edge_sdk.model.loss import (
    IGNORED,
    LossSums,
    find_plain_head,
    fits_fused,
    fused_loss,
    loss_sums,
    target_sums,
    whole_sums,
)
from edge_sdk.model.partition import Slice
from profiler.estimate import sizes
from tests.tiny import BLOCKS, VOCAB, make_parts

LENGTHS = torch.tensor([9, 6, 8])
UNITS = torch.tensor([0.3, 0.5, 0.7])
RELATIVE = 1e-6
_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
}
# By what is special about their tails, and whether the logits are `W x + b`, softly capped or not.
TAILS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "own head": ("llama", {}, True),
    "tied head": ("llama", {"tie_word_embeddings": True}, True),
    "bias": ("phi", {}, True),
    "softcap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}, True),
    "scaled down": ("granite", {"logits_scaling": 4.0}, False),
    "scaled": ("cohere", {"logit_scale": 0.3, "bos_token_id": 0, "eos_token_id": 2}, False),
    "projected": ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 48}, True),
    "few positions": (
        "gpt2",
        {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 4},
        True,
    ),
}


@cache
def tail_of(name: str) -> Slice:
    """A slice that holds the whole of a tiny model with such a tail."""
    kind, settings, _ = TAILS[name]
    config = AutoConfig.for_model(kind, **{**_SIZE, **settings})
    config.use_cache = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    layout = find_layout(config, "causal-lm")
    slice_ = Slice(config, "causal-lm", layout, torch.float32)
    for part, tensors in make_parts(model, layout, list(layout.part_names())).items():
        slice_.add(part, tensors)
    slice_.model.eval()
    return slice_


def prompts() -> torch.Tensor:
    """Labels of three sequences of prompts and completions."""
    labels_BT = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    labels_BT[:, :4] = IGNORED
    labels_BT[1, 6:] = IGNORED
    labels_BT[2, 8:] = IGNORED
    return labels_BT


def states(slice_: Slice, rows: int = 3, positions: int = 9) -> torch.Tensor:
    """Hidden states after the last block, a leaf."""
    return slice_.some_states(rows, positions).requires_grad_(True)


def both(
    name: str, units_B: torch.Tensor | None = UNITS
) -> tuple[LossSums, LossSums, float, float]:
    """Sums at the targets and from all logits; relative differences of loss and gradient."""
    slice_ = tail_of(name)
    ours, theirs = states(slice_), states(slice_)
    found = target_sums(slice_, ours, prompts(), units_B)
    wanted = loss_sums(slice_.logits(theirs, LENGTHS, BLOCKS), prompts())
    for sums in (found, wanted):
        (sums.loss_B * UNITS).sum().backward()
    assert ours.grad is not None
    return (
        found,
        wanted,
        relative(found.loss_B, wanted.loss_B),
        relative(ours.grad, theirs.grad),
    )


def relative(found: torch.Tensor, wanted: torch.Tensor | None) -> float:
    """Return the difference by the norm of what is wanted."""
    assert wanted is not None
    return float((found - wanted).detach().norm() / wanted.detach().norm())


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


@pytest.mark.parametrize("name", [name for name in TAILS if name != "few positions"])
def test_the_tail_at_its_targets_gives_the_loss_of_the_whole(name: str) -> None:
    """Tied, scaled, capped, projected or with a bias: loss, counts and gradient are the same."""
    found, wanted, loss, gradient = both(name)

    assert (loss, gradient) <= (RELATIVE, RELATIVE)
    assert found.targets_B.tolist() == wanted.targets_B.tolist() == [5, 2, 4]
    assert torch.equal(found.correct_B, wanted.correct_B)


def test_targets_may_be_more_than_the_model_has_positions() -> None:
    """Each is a sequence of its own, so that no table of positions is left."""
    slice_ = tail_of("few positions")
    hidden, labels_BT = states(slice_, 4, 4), torch.ones((4, 4), dtype=torch.long)

    sums = target_sums(slice_, hidden, labels_BT)

    wanted = loss_sums(slice_.logits(hidden, torch.full((4,), 4), BLOCKS), labels_BT)
    torch.testing.assert_close(sums.loss_B, wanted.loss_B)


def test_a_gradient_is_right_whatever_it_is_multiplied_by() -> None:
    """A loss that is scaled otherwise than was announced has the gradient of that scale."""
    _, _, _, gradient = both("own head", None)

    assert gradient <= RELATIVE


def test_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One target at a time, four, and all at once."""
    found = {}
    for count in (1, 4, 100):
        monkeypatch.setattr(sizes, "TAIL_LOGITS", count * VOCAB)
        _, _, loss, gradient = both("softcap")
        found[count] = max(loss, gradient)

    assert max(found.values()) <= RELATIVE


def test_no_tensor_has_logits_of_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards the largest one of vocabulary size is that of a few targets."""
    slice_ = tail_of("own head")
    hidden, labels_BT = states(slice_), torch.ones((3, 9), dtype=torch.long)
    monkeypatch.setattr(sizes, "TAIL_LOGITS", 2 * VOCAB)

    with Largest() as seen:
        target_sums(slice_, hidden, labels_BT).loss_B.sum().backward()

    assert seen.rows == 2


class Largest(TorchDispatchMode):
    """Remembers the most rows of what is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what an operator returns."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, torch.Tensor) or tensor.shape == (32, VOCAB):
                continue  # the head itself
            if tensor.shape[-1:] == (VOCAB,):
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return found


def test_a_whole_model_is_asked_at_its_targets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids to loss and gradient, as from all logits, without them."""
    slice_ = tail_of("tied head")
    ids_BT = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(3))
    wanted = loss_sums(slice_.whole(ids_BT, LENGTHS), prompts())
    monkeypatch.delattr(Slice, "whole")

    found = whole_sums(slice_, ids_BT, LENGTHS, prompts())

    assert relative(found.loss_B, wanted.loss_B) <= RELATIVE


def test_no_target_has_no_loss_and_no_gradient() -> None:
    """Zero, not NaN, and still differentiable."""
    slice_ = tail_of("own head")
    hidden = states(slice_)

    sums = target_sums(slice_, hidden, torch.full((3, 9), IGNORED))
    sums.loss_B.sum().backward()

    assert sums.loss_B.tolist() == [0.0, 0.0, 0.0]
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("name", TAILS)
def test_a_head_is_plain_where_a_fused_kernel_would_find_the_same(name: str) -> None:
    """Scaled logits are no product of head and state, whatever the config says of them."""
    assert (find_plain_head(tail_of(name)) is not None) == TAILS[name][2]


@pytest.mark.parametrize("name", [name for name, (_, _, plain) in TAILS.items() if plain])
def test_a_fused_kernel_is_given_what_it_needs(name: str) -> None:
    """What has the arguments of Liger's function finds the loss and gradient of the pieces."""
    slice_, labels_N = tail_of(name), torch.arange(5)
    ours, theirs = (slice_.some_states(5, 1)[:, 0].requires_grad_(True) for _ in range(2))
    head = find_plain_head(slice_)
    assert head is not None

    loss_N = fused_loss(as_liger, slice_, head, ours, labels_N)
    loss_N.sum().backward()

    wanted_N = F.cross_entropy(slice_.at_positions(theirs), labels_N, reduction="none")
    wanted_N.sum().backward()
    assert ours.grad is not None
    assert relative(loss_N, wanted_N) <= RELATIVE
    assert relative(ours.grad, theirs.grad) <= RELATIVE


def as_liger(
    input: torch.Tensor,  # noqa: A002 - the name there
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ce_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute by torch what `liger_fused_linear_cross_entropy` of 0.5 documents."""
    assert (ce_weight, lse_square_scale, label_smoothing) == (None, 0.0, 0.0)
    logits = F.linear(input, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


@pytest.mark.parametrize(
    ("device", "compute", "is_installed", "fits"),
    [
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float32, True, True),
        ("cuda", torch.float16, True, False),
        ("cuda", torch.bfloat16, False, False),
        ("cpu", torch.bfloat16, True, False),
    ],
)
def test_a_fused_kernel_is_taken_where_it_is_and_holds(
    device: str, compute: torch.dtype, is_installed: bool, fits: bool
) -> None:
    """On CUDA, where it is installed, and not in float16."""
    assert fits_fused(torch.device(device), compute, is_installed=is_installed) == fits
