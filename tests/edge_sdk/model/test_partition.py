"""Any stretch of blocks computes what the same blocks compute in the unsplit model, bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from edge_sdk.errors import ModelError
from edge_sdk.model.layout import Layout, Task, find_layout
from edge_sdk.model.partition import Slice
from tests.tiny import BLOCKS, FAMILIES, OTHERS, VOCAB, make_config, make_model, make_parts, task_of

ALL = [*FAMILIES, *OTHERS]
CUTS = [(i,) for i in range(1, BLOCKS + 1)]
CUTS += [(i, j) for i in range(1, BLOCKS) for j in range(i + 1, BLOCKS + 1)]


class Whole:
    """An unsplit tiny model, what it computes, and its parts."""

    def __init__(self, family: str, task: Task, config: Any) -> None:
        self.config, self.task = config, task
        self.layout: Layout = find_layout(config, task)
        self.model = make_model(config, task).eval()
        generator = torch.Generator().manual_seed(1)
        self.lengths_B = torch.tensor([9, 4, 6], dtype=torch.int32)
        self.ids_BT = torch.randint(3, VOCAB, (3, 9), generator=generator)
        self.mask_BT = (torch.arange(9)[None] < self.lengths_B[:, None]).long()
        self.ids_BT[self.mask_BT == 0] = config.pad_token_id
        with torch.no_grad():
            output = self.model(input_ids=self.ids_BT, attention_mask=self.mask_BT)
        self.logits: torch.Tensor = output.logits

    def piece(self, *names: str, dtype: torch.dtype = torch.float32) -> Slice:
        """A slice in which only the named parts are present."""
        slice_ = Slice(self.config, self.task, self.layout, dtype)
        for name, tensors in make_parts(self.model, self.layout, list(names)).items():
            slice_.add(name, tensors)
        slice_.model.eval()
        return slice_

    def blocks(self, first: int, stop: int) -> list[str]:
        """Names of parts."""
        return [f"block.{i}" for i in range(first, stop)]

    def top(self) -> list[str]:
        """What the tail needs."""
        return ["tail", *(["front"] if self.layout.tail_needs_front else [])]

    def error(self, logits: torch.Tensor) -> float:
        """Largest difference of a logit at a real position."""
        difference = (logits - self.logits).abs()
        if difference.dim() == 3:
            difference = difference[self.mask_BT.bool()]
        return float(difference.max())


@cache
def whole(family: str) -> Whole:
    """The unsplit model of a family; built once."""
    return Whole(family, task_of(family), make_config(family, pad_token_id=1))


@cache
def whole_classifier(family: str) -> Whole:
    """A causal family with a classifier's head, which pools at the last real token."""
    config = make_config(family, pad_token_id=1, num_labels=3)
    return Whole(family, "sequence-classification", config)


def run_split(model: Whole, splits: tuple[int, ...]) -> torch.Tensor:
    """Logits of a model cut at *splits*; every piece is a slice of its own."""
    with torch.no_grad():
        device = model.piece("front", *model.blocks(0, splits[0]))
        hidden = device.front(model.ids_BT, model.lengths_B, splits[0])
        for first, stop in zip(splits, splits[1:], strict=False):
            middle = model.piece(*model.blocks(first, stop))
            hidden = middle.middle(hidden, model.lengths_B, first, stop)
        last = model.piece(*model.blocks(splits[-1], BLOCKS), *model.top())
        return last.logits(hidden, model.lengths_B, splits[-1])


@pytest.mark.parametrize("splits", [(2,), (1, 4)])
@pytest.mark.parametrize("family", ALL)
def test_pieces_give_the_logits_of_the_unsplit_model(family: str, splits: tuple[int, ...]) -> None:
    """Pieces that know nothing of each other's weights give the same bits for padded batches."""
    assert whole(family).error(run_split(whole(family), splits)) == 0.0


@pytest.mark.parametrize("family", ALL)
def test_any_cut_gives_the_logits_of_the_unsplit_model(family: str) -> None:
    """Every cut in two and in three gives the same bits, the tail alone included."""
    model = whole(family)
    every = model.piece("front", *model.blocks(0, BLOCKS), "tail")

    errors = {}
    for splits in CUTS:
        with torch.no_grad():
            hidden = every.front(model.ids_BT, model.lengths_B, splits[0])
            for first, stop in zip(splits, splits[1:], strict=False):
                hidden = every.middle(hidden, model.lengths_B, first, stop)
            logits = every.logits(hidden, model.lengths_B, splits[-1])
        errors[splits] = model.error(logits)

    assert errors == dict.fromkeys(CUTS, 0.0)


@pytest.mark.parametrize("splits", [(1,), (2, BLOCKS), (BLOCKS,)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_head_that_pools_by_padding_sees_it(family: str, splits: tuple[int, ...]) -> None:
    """The tail never sees token ids, yet finds the last real token of each sequence."""
    model = whole_classifier(family)

    assert model.error(run_split(model, splits)) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_through_a_cut(family: str) -> None:
    """The gradient by the hidden state is that of the unsplit model, padding included."""
    model = whole(family)
    every = model.piece("front", *model.blocks(0, BLOCKS), "tail")
    hidden = every.front(model.ids_BT, model.lengths_B, 3).detach().requires_grad_(True)
    kept: list[torch.Tensor] = []
    blocks: Any = model.model.get_submodule(model.layout.blocks_path)

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        hidden_BTD.requires_grad_(True).retain_grad()
        kept.append(hidden_BTD)

    handle = blocks[3].register_forward_pre_hook(keep, with_kwargs=True)
    output = model.model(input_ids=model.ids_BT, attention_mask=model.mask_BT)
    handle.remove()
    is_token = output.logits.dim() == 3
    rows: Any = model.mask_BT.bool() if is_token else slice(None)
    output.logits[rows].square().sum().backward()

    every.logits(hidden, model.lengths_B, 3)[rows].square().sum().backward()

    model.model.zero_grad()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, kept[0].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "modernbert"])
def test_absent_parts_take_no_memory(family: str) -> None:
    """Absent blocks are on the meta device, absent embeddings and heads take one number each."""
    model = whole(family)

    piece = model.piece(*model.blocks(2, 4))

    tensors = piece.model.state_dict(keep_vars=True)
    for index, names in enumerate(model.layout.blocks):
        assert {tensors[name].is_meta for name in names} == {index not in (2, 3)}
    for name in (*model.layout.front, *model.layout.tail):
        tensor = tensors[name]
        assert tensor.untyped_storage().nbytes() == tensor.element_size()
        assert tensor.shape == model.model.state_dict()[name].shape
    assert piece.present == {"block.2", "block.3"}


def test_a_tied_head_is_one_tensor() -> None:
    """Embeddings and a head tied to them share their memory in a slice that has both."""
    model = whole("llama")

    modules: Any = model.piece("front", "tail").model

    assert modules.lm_head.weight is modules.model.embed_tokens.weight


def test_a_block_can_come_late() -> None:
    """A block that was absent works once it is added, its own buffers included."""
    model = whole("gemma3_text")
    piece = model.piece(*model.blocks(3, BLOCKS), *model.top())
    piece.add("block.2", make_parts(model.model, model.layout, ["block.2"])["block.2"])
    device = model.piece("front", *model.blocks(0, 2))

    with torch.no_grad():
        hidden = device.front(model.ids_BT, model.lengths_B, 2)
        logits = piece.logits(hidden, model.lengths_B, 2)

    assert model.error(logits) == 0.0


def test_tensors_take_the_dtype_of_the_slice() -> None:
    """Float tensors are converted as they come in."""
    model = whole("gpt2")

    piece = model.piece("block.0", dtype=torch.bfloat16)

    state = piece.model.state_dict()
    assert {state[name].dtype for name in model.layout.part("block.0")} == {torch.bfloat16}


def test_training_a_head_leaves_its_source_alone() -> None:
    """A classifier's head is trained in place, but never in somebody else's tensors."""
    model = whole("bert")
    before = model.model.state_dict()["classifier.weight"].clone()
    piece = model.piece("tail")

    with torch.no_grad():
        piece.model.get_parameter("classifier.weight").add_(1.0)

    assert torch.equal(model.model.state_dict()["classifier.weight"], before)


def test_a_missing_tensor_is_refused() -> None:
    """A part without one of its tensors is refused by name."""
    model = whole("gpt2")
    tensors = make_parts(model.model, model.layout, ["block.1"])["block.1"]
    name = model.layout.part("block.1")[3]
    del tensors[name]

    with pytest.raises(ModelError, match=f"part 'block.1' lacks tensor '{name}'"):
        model.piece().add("block.1", tensors)


def test_a_tensor_of_another_shape_is_refused() -> None:
    """A tensor that the config does not expect is refused with both shapes."""
    model = whole("gpt2")
    tensors = make_parts(model.model, model.layout, ["tail"])["tail"]
    tensors["transformer.ln_f.weight"] = torch.zeros(7)

    with pytest.raises(ModelError, match=r"ln_f.weight: shape \(7,\), the config says \(32,\)"):
        model.piece().add("tail", tensors)


def test_a_failing_stretch_leaves_the_model_as_it_was() -> None:
    """An error inside a stretch does not leave the model cut down."""
    model = whole("llama")
    every = model.piece("front", *model.blocks(0, BLOCKS), "tail")

    with pytest.raises(RuntimeError):
        every.middle(torch.zeros(3, 9, 5), model.lengths_B, 1, 3)

    with torch.no_grad():
        assert model.error(every.whole(model.ids_BT, model.lengths_B)) == 0.0


@pytest.mark.parametrize("family", [f for f in ALL if task_of(f) == "causal-lm"])
def test_a_tail_looks_at_one_position_at_a_time(family: str) -> None:
    """Any few positions give the logits that they have among all others."""
    model = whole(family)
    piece = model.piece("front", *model.blocks(0, BLOCKS), "tail")
    chosen_BT = torch.rand(3, 9, generator=torch.Generator().manual_seed(5)) < 0.4

    with torch.no_grad():
        hidden_BTD = piece.front(model.ids_BT, model.lengths_B, BLOCKS)
        logits_NV = piece.at_positions(hidden_BTD[chosen_BT & model.mask_BT.bool()])

    wanted_NV = model.logits[chosen_BT & model.mask_BT.bool()]
    assert piece.has_local_tail
    assert float((logits_NV - wanted_NV).norm() / wanted_NV.norm()) <= 1e-6


def test_a_tail_that_looks_around_is_given_all_positions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A norm over all positions is found out, and said once in a line of the log."""
    model = whole("llama")
    piece = model.piece(*model.top())
    norm = piece.model.get_submodule("model.norm")
    monkeypatch.setattr(norm, "forward", lambda x: x - x.mean(1, keepdim=True))

    assert [piece.has_local_tail, piece.has_local_tail] == [False, False]
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "tail.all_positions reason=its logits depend on other positions" in caplog.text


def test_a_classifier_has_no_tail_for_single_positions() -> None:
    """Its head looks at a sequence; nothing is said of it."""
    model = whole("bert")

    assert not model.piece(*model.top()).has_local_tail
