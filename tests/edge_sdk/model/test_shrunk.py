"""The narrow stand-in of a model has every kind of its blocks, in their order."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from edge_sdk.model.layout import Task, build_empty, find_blocks
from edge_sdk.model.shrunk import block_kinds, runs, shrink

# Each kind of setting that says which block is of which kind, with its model's usual numbers.
FAMILIES: dict[str, tuple[Task, dict[str, Any]]] = {
    "llama": ("causal-lm", {}),
    "gpt2": ("causal-lm", {}),
    "bert": ("sequence-classification", {}),
    "gemma3_text": ("causal-lm", {}),  # layer_types
    "deepseek_v3": (
        "causal-lm",
        {"num_hidden_layers": 9, "n_routed_experts": 16},
    ),  # first_k_dense_replace
    "qwen3_moe": ("causal-lm", {"mlp_only_layers": [1, 3], "num_hidden_layers": 8}),
    "jamba": ("causal-lm", {}),  # a period and an offset, twice
    "gpt_neo": ("causal-lm", {}),  # attention_types
    "gemma4_text": ("causal-lm", {"num_kv_shared_layers": 6, "num_hidden_layers": 14}),
    "smollm3": ("causal-lm", {}),  # no_rope_layers
    "nemotron_h": ("causal-lm", {}),  # layers_block_type
}


@cache
def shrunk(family: str) -> Any:
    """The stand-in of a family's usual model."""
    task, changes = FAMILIES[family]
    return shrink(AutoConfig.for_model(family, **changes), task)


def kinds_of(config: Any, task: Task) -> list[int]:
    """The kinds of the blocks of the model of *config*."""
    model = build_empty(config, task, torch.float32)
    blocks: Any = model.get_submodule(find_blocks(model))
    return block_kinds(list(blocks))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_block_and_every_sequence_of_two_stays(family: str) -> None:
    """What follows what in the model does so in its stand-in, and nothing else does."""
    task, changes = FAMILIES[family]
    config = AutoConfig.for_model(family, **changes)

    small = shrunk(family)

    kinds, found = kinds_of(config, task), kinds_of(small, task)
    assert len(set(found)) == len(set(kinds))
    assert len(set(zip(found, found[1:], strict=False))) >= len(
        set(zip(kinds, kinds[1:], strict=False))
    )
    assert 4 <= len(found) <= max(16, len(kinds))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_small_and_runs(family: str) -> None:
    """A stand-in has less than a million parameters, and the special tokens are in its table."""
    task, _ = FAMILIES[family]

    small = shrunk(family)

    assert runs(small, task)
    assert sum(p.numel() for p in build_empty(small, task, torch.float32).parameters()) < 10**6
    special = [small.pad_token_id, small.bos_token_id]
    assert all(0 <= token < small.vocab_size for token in special if token is not None)


def test_the_config_it_is_made_of_stays() -> None:
    """The model's own config is not touched."""
    config = AutoConfig.for_model("qwen3")
    before = config.to_json_string()

    shrink(config, "causal-lm")

    assert config.to_json_string() == before
