"""Blocks that get more than a hidden state are cut where that is exact, and nowhere else."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from edge_sdk.errors import ModelError
from edge_sdk.model.layout import Layout, find_layout
from edge_sdk.model.partition import Slice
from tests.families import BLOCKS, MORE, more_config, more_model
from tests.tiny import CLASSES, VOCAB

EVERYWHERE = tuple(range(1, BLOCKS + 1))
# What reaches blocks after the first beside the hidden state: (some of) the front, the ids; and
# where the model can be cut.
FACTS: dict[str, tuple[str, bool, tuple[int, ...]]] = {
    **dict.fromkeys(MORE, ("", False, EVERYWHERE)),
    "gemma4": ("embed_tokens_per_layer", True, (1, 4)),
    "gemma3n": ("embed_tokens_per_layer", True, (1, 4)),
    "deepseek_v4": ("", True, EVERYWHERE),
    "mpnet": ("relative_attention_bias", False, EVERYWHERE),
    "roformer": ("embed_positions", False, EVERYWHERE),
    "deberta": ("rel_embeddings", False, EVERYWHERE),
    "zamba2": ("embed_tokens", True, EVERYWHERE),
}


class Cut:
    """A tiny model, and the two sides that it is cut into."""

    def __init__(self, name: str) -> None:
        config, task = more_config(name), MORE[name][1]
        self.layout: Layout = find_layout(config, task)
        self.model = more_model(name, config)
        state = self.model.state_dict()
        blocks = [f"block.{i}" for i in range(BLOCKS)]
        top = ["late", "tail", *(["front"] if self.layout.tail_needs_front else [])]
        self.sides = []
        for parts in (["front", *blocks], [*blocks[1:], *top]):
            side = Slice(config, task, self.layout, torch.float32)
            for part in parts:
                side.add(part, {n: state[n].clone() for n in self.layout.part(part)})
            side.model.eval()
            self.sides.append(side)
        generator = torch.Generator().manual_seed(1)
        self.lengths_B = torch.tensor([9, 4, 6], dtype=torch.int32)
        self.ids_BT = torch.randint(3, VOCAB, (3, 9), generator=generator)
        self.mask_BT = (torch.arange(9)[None] < self.lengths_B[:, None]).long()
        self.ids_BT[self.mask_BT == 0] = 1

    def whole(self) -> torch.Tensor:
        """Logits of the unsplit model, where tokens are."""
        output = self.model(input_ids=self.ids_BT, attention_mask=self.mask_BT)
        return self._real(output.logits)

    def front(self, cut: int) -> torch.Tensor:
        """What the device sends."""
        return self.sides[0].front(self.ids_BT, self.lengths_B, cut)

    def rest(self, hidden_BTD: torch.Tensor, first: int) -> torch.Tensor:
        """Logits from there, by a side that has neither block 0 nor the front."""
        ids_BT = self.ids_BT if self.layout.needs_ids else None
        after = next((cut for cut in self.layout.cuts if cut > first), BLOCKS)
        if after < BLOCKS:
            hidden_BTD = self.sides[1].middle(hidden_BTD, self.lengths_B, first, after, ids_BT)
            first = after
        return self._real(self.sides[1].logits(hidden_BTD, self.lengths_B, first, ids_BT=ids_BT))

    def _real(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[self.mask_BT.bool()] if logits.dim() == 3 else logits

    def gradients(self, *models: nn.Module) -> dict[str, torch.Tensor]:
        """The gradients of all weights of the blocks; what both sides hold is added."""
        found: dict[str, torch.Tensor] = {}
        named = [dict(model.named_parameters()) for model in models]
        for name in {n for names in self.layout.blocks for n in names if n in named[0]}:
            own = [p.grad for p in (weights[name] for weights in named) if p.grad is not None]
            if own:
                found[name] = torch.stack(own).sum(0)
        return found


@cache
def cut_of(name: str) -> Cut:
    """The two sides of a family; made once."""
    return Cut(name)


@pytest.mark.parametrize("name", MORE)
def test_what_blocks_get_beside_the_hidden_state_is_found(name: str) -> None:
    """Tensors of the front, token ids and legal cuts are found by watching, for every kind."""
    late, needs_ids, cuts = FACTS[name]
    layout = cut_of(name).layout

    assert bool(layout.late) == bool(late)
    assert any(f".{late}." in found for found in layout.late) or not late
    assert set(layout.late) <= set(layout.front)
    assert layout.needs_ids is needs_ids
    assert layout.cuts == cuts


@pytest.mark.parametrize("name", MORE)
def test_every_legal_cut_is_exact(name: str) -> None:
    """Two and three pieces give the bits of the unsplit model, padding in the batch included."""
    cut = cut_of(name)

    with torch.no_grad():
        whole = cut.whole()
        errors = {
            k: float((cut.rest(cut.front(k), k) - whole).abs().max()) for k in cut.layout.cuts
        }

    # Of convolutions some processors choose the kernel by where the weights lie in memory.
    convolves = any(isinstance(module, nn.Conv1d) for module in cut.model.modules())
    assert errors.keys() == set(cut.layout.cuts)
    assert max(errors.values()) <= (1e-6 * float(whole.abs().max()) if convolves else 0.0)


@pytest.mark.parametrize("name", MORE)
def test_gradients_pass_every_kind_of_block(name: str) -> None:
    """Backward through a cut gives every weight of the blocks the unsplit model's gradient."""
    cut = cut_of(name)
    k = cut.layout.cuts[1]
    for model in (cut.model, *(side.model for side in cut.sides)):
        model.zero_grad()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and not parameter.is_meta)

    cut.whole().square().sum().backward()
    sent = cut.front(k)
    received = sent.detach().requires_grad_(True)
    cut.rest(received, k).square().sum().backward()
    sent.backward(received.grad)

    expected = cut.gradients(cut.model)
    found = cut.gradients(*(side.model for side in cut.sides))
    assert found.keys() == expected.keys()
    for weight, gradient in expected.items():
        error = (found[weight] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error <= 1e-6, f"{weight}: {error}"


@pytest.mark.parametrize(
    ("shared", "kinds", "cuts"),
    [(1, "sfsf", (1, 4)), (2, "sfsf", (4,)), (1, "ffff", (1, 2, 4)), (2, "ffff", (1, 4))],
)
def test_a_cut_never_parts_blocks_that_share(
    shared: int, kinds: str, cuts: tuple[int, ...]
) -> None:
    """Where later blocks read keys and values of earlier ones, all of them stay on one side."""
    types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    config = more_config("gemma4", num_kv_shared_layers=shared, layer_types=types)

    assert find_layout(config, "causal-lm").cuts == cuts


def test_a_model_whose_blocks_pass_on_no_state_for_each_token_is_refused() -> None:
    """An encoder that shortens its sequences is refused in one line."""
    from transformers import AutoConfig

    settings = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model(
        "canine", **settings, num_hidden_layers=2, num_labels=CLASSES, pad_token_id=0
    )

    with pytest.raises(ModelError, match="no state for each token") as caught:
        find_layout(config, "sequence-classification")

    assert "\n" not in str(caught.value)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    """A model of two stacks, of which one reads the other, is refused in one line."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("bart", d_model=16, encoder_layers=2, decoder_layers=2)

    with pytest.raises(ModelError, match="an encoder with a decoder"):
        find_layout(config, "sequence-classification")
