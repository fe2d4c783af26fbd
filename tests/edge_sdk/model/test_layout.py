"""What belongs before, in and after the blocks is found for every family without weights."""

from __future__ import annotations

import ast
import inspect
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from edge_sdk.errors import ModelError
from edge_sdk.model import layout as layout_module
from edge_sdk.model import partition as partition_module
from edge_sdk.model.layout import build_empty, find_blocks, find_layout, known_layout
from tests.tiny import BLOCKS, FAMILIES, OTHERS, layout_of, make_config, make_model, task_of

ALL = [*FAMILIES, *OTHERS]


@pytest.mark.parametrize("family", ALL)
def test_every_tensor_belongs_to_exactly_one_part(family: str) -> None:
    """Parts overlap nowhere and together are the whole model, tied weights counted once."""
    model = make_model(make_config(family), task_of(family))
    layout = layout_of(family)

    names = [name for part in layout.part_names() for name in layout.part(part)]

    assert len(names) == len(set(names))
    assert layout.num_blocks == BLOCKS == len(layout.blocks)
    state = model.state_dict(keep_vars=True)
    assert {id(state[name]) for name in names} == {id(tensor) for tensor in state.values()}


@pytest.mark.parametrize("family", ["gpt2", "bert", "qwen2_moe"])
def test_a_block_holds_what_stands_under_its_path(family: str) -> None:
    """Block i is every tensor below `<blocks_path>.<i>.` and nothing else is."""
    model = make_model(make_config(family), task_of(family))
    layout = layout_of(family)

    for index, names in enumerate(layout.blocks):
        prefix = f"{layout.blocks_path}.{index}."
        assert set(names) == {name for name in model.state_dict() if name.startswith(prefix)}
    outside = (*layout.front, *layout.tail)
    assert not [name for name in outside if name.startswith(f"{layout.blocks_path}.")]


@pytest.mark.parametrize(("tied", "needs_front"), [(True, True), (False, False)])
def test_a_tied_head_stands_in_the_front_only(tied: bool, needs_front: bool) -> None:
    """A head tied to the embeddings is one tensor, of the front; an untied one is the tail's."""
    config = make_config("llama", tie_word_embeddings=tied)

    layout = find_layout(config, "causal-lm")

    assert layout.tail_needs_front is needs_front
    assert "model.embed_tokens.weight" in layout.front
    expected = ("model.norm.weight",) if tied else ("model.norm.weight", "lm_head.weight")
    assert layout.tail == expected


@pytest.mark.parametrize("family", ["gpt2", "bert", "gemma3_text"])
def test_an_empty_model_has_no_weights(family: str) -> None:
    """A model built to look at its shape keeps every parameter on the meta device."""
    model = build_empty(make_config(family), task_of(family), torch.float32)

    assert all(parameter.is_meta for parameter in model.parameters())
    assert not [n for n, b in model.named_buffers() if b.is_meta]


def test_looking_at_a_model_changes_nothing() -> None:
    """The caller's config is left as it was, and the same config gives the same layout."""
    config = make_config("gpt2", use_cache=True)
    config.use_cache = True
    before = config.to_json_string()

    first, second = find_layout(config, "causal-lm"), find_layout(config, "causal-lm")

    assert first == second
    assert config.to_json_string() == before


class Listed(nn.Module):
    """A model of which only the module lists matter."""

    def __init__(self, **lists: nn.ModuleList) -> None:
        super().__init__()
        self.config: Any = make_config("llama")
        for name, entries in lists.items():
            setattr(self, name, entries)


def _linears(count: int, size: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(size, size) for _ in range(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_layout_is_that_which_is_found(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout is found once for equal configurations, and anew for one that differs in a value."""
    task = task_of(family)
    found = find_layout(make_config(family), task)
    known_layout(make_config(family), task)
    with monkeypatch.context() as patched:
        patched.setattr(layout_module, "find_layout", None)
        assert known_layout(make_config(family), task) == found
    deeper = make_config(family)
    deeper.num_hidden_layers = 1
    if getattr(deeper, "layer_types", None):
        deeper.layer_types = deeper.layer_types[:1]
    assert known_layout(deeper, task) == find_layout(deeper, task) != found


def test_of_two_lists_the_blocks_are_where_the_weights_are() -> None:
    """When two lists have as many entries as the model has blocks, the heavier one is it."""
    model = Listed(small=_linears(BLOCKS, 2), large=_linears(BLOCKS, 8))

    assert find_blocks(model) == "large"


def test_a_model_without_a_list_of_that_length_is_refused() -> None:
    """The error names the class, the wanted length and the lists that there are."""
    model = Listed(experts=_linears(BLOCKS + 1, 2))

    with pytest.raises(ModelError, match=r"Listed: no list of 5 blocks .* seen: experts \(6\)"):
        find_blocks(model)


def test_a_real_model_without_a_block_list_is_refused() -> None:
    """A model that runs one shared block over and over cannot be cut, and we say so."""
    size = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 16, "vocab_size": 31}
    config = AutoConfig.for_model(
        "albert", num_hidden_layers=3, num_attention_heads=2, num_labels=2, **size
    )

    with pytest.raises(ModelError, match="no list of 3 blocks"):
        find_layout(config, "sequence-classification")


def test_a_model_of_another_kind_is_refused_in_one_line() -> None:
    """A vision model is no language model; transformers' long answer is cut to its first line."""
    config = AutoConfig.for_model("vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)

    with pytest.raises(ModelError, match="no causal-lm model of type 'vit'") as caught:
        find_layout(config, "causal-lm")

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("module", [layout_module, partition_module])
def test_no_model_family_is_named(module: Any) -> None:
    """The code that cuts models knows none of them by name."""
    tree = ast.parse(inspect.getsource(module))
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {a.name for n in ast.walk(tree) if isinstance(n, ast.alias) for a in [n]}
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    words |= {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    }
    known = {name.lower().replace("-", "_") for name in CONFIG_MAPPING_NAMES}
    long = {name for name in known if len(name) > 3}  # "git", "xlm" and the like are words too

    assert not [w for w in words for name in long if name in w.lower().split("_")]
    assert not [w for w in words for name in FAMILIES if name in w.lower()]


@pytest.mark.parametrize("family", ALL)
def test_an_empty_model_takes_memory_for_buffers_only(family: str) -> None:
    """Every parameter is on the meta device, every buffer has the whole model's values."""
    config, task = make_config(family), task_of(family)
    whole = dict(make_model(config, task).named_buffers())

    empty = build_empty(config, task, torch.float32)

    assert {p.device.type for p in empty.parameters()} == {"meta"}
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == whole.keys()
    assert all(torch.equal(buffer, whole[name]) for name, buffer in buffers.items())


def test_other_threads_see_nothing_of_a_model_that_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modules that an application makes meanwhile have weights, and torch is as it was."""
    build, found = layout_module._from_config, list[torch.device]()
    before = dict(vars(nn.Module)), torch.empty

    def meanwhile() -> None:
        found.append(nn.Linear(2, 2).weight.device)

    def spy(*arguments: Any) -> nn.Module:
        other = threading.Thread(target=meanwhile)
        other.start()
        other.join()
        assert (dict(vars(nn.Module)), torch.empty) == before
        return build(*arguments)

    monkeypatch.setattr(layout_module, "_from_config", spy)

    model = build_empty(make_config("llama"), "causal-lm", torch.float32)

    assert found == [torch.device("cpu")]
    assert model.get_input_embeddings().weight.device.type == "meta"
