"""Tiny models of several families, built from configs; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from edge_sdk.data.batches import MicroBatch
from edge_sdk.model.layout import Layout, Task, find_layout

VOCAB = 97
BLOCKS = 5
CLASSES = 4

_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = {"num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[Task, dict[str, Any]]] = {
    "gpt2": ("causal-lm", _GPT2),
    "llama": ("causal-lm", {**_SIZE, **_GROUPED, "tie_word_embeddings": True}),
    "qwen3": (
        "causal-lm",
        {
            **_SIZE,
            **_GROUPED,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    ),
    "bert": ("sequence-classification", {**_SIZE, **_NO_DROPOUT}),
    "roberta": ("sequence-classification", {**_SIZE, **_NO_DROPOUT}),
}
OTHERS: dict[str, tuple[Task, dict[str, Any]]] = {
    "gemma3_text": (
        "causal-lm",
        {**_SIZE, **_GROUPED, "head_dim": 8, "sliding_window": 3, "sliding_window_pattern": 2},
    ),
    "opt": (
        "causal-lm",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "word_embed_proj_dim": 16,
            "dropout": 0.0,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("causal-lm", _SIZE),
    "phi": ("causal-lm", {**_SIZE, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "modernbert": (
        "sequence-classification",
        {**_SIZE, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "qwen2_moe": (
        "causal-lm",
        {
            **_SIZE,
            **_GROUPED,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
        },
    ),
}
_EXPERTS = {**_SIZE, **_GROUPED, "num_experts_per_tok": 2}
# Experts in one parameter: (E, O, I) with two linear layers made one, (E, I, O), and Llama 4, which
# lies that way and of which PEFT believes the other; all experts at once, or the chosen ones.
EXPERTS: dict[str, tuple[Task, dict[str, Any]]] = {
    "mixtral": ("causal-lm", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (
        "causal-lm",
        {
            **_EXPERTS,
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 16,
        },
    ),
    "gpt_oss": (
        "causal-lm",
        {
            **_EXPERTS,
            "head_dim": 8,
            "num_local_experts": 4,
            "sliding_window": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (
        "causal-lm",
        {
            **_EXPERTS,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,  # a block without experts
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "llama4_text": (
        "causal-lm",
        {
            **_EXPERTS,
            "head_dim": 8,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 16,
        },
    ),
}


def make_config(family: str, **changes: Any) -> Any:
    """The config of a tiny model."""
    _, settings = {**FAMILIES, **OTHERS, **EXPERTS}[family]
    task = task_of(family)
    if task == "sequence-classification":
        settings = {**settings, "num_labels": CLASSES}
    config = AutoConfig.for_model(family, **{**settings, **changes})
    config.use_cache = False
    return config


def task_of(family: str) -> Task:
    """What the family is used for here."""
    return {**FAMILIES, **OTHERS, **EXPERTS}[family][0]


def make_model(config: Any, task: Task, seed: int = 0) -> nn.Module:
    """The whole model with random weights."""
    torch.manual_seed(seed)
    factory: Any = AutoModelForCausalLM
    if task == "sequence-classification":
        factory = AutoModelForSequenceClassification
    kind = "eager" if config.model_type == "gpt_oss" else "sdpa"  # it has no other
    model: nn.Module = factory.from_config(config, attn_implementation=kind)
    return model


def make_parts(model: nn.Module, layout: Layout, names: list[str]) -> dict[str, Any]:
    """The named parts of *model*."""
    state = model.state_dict()
    return {name: {n: state[n] for n in layout.part(name)} for name in names}


def layout_of(family: str) -> Layout:
    """The layout of a tiny model."""
    return find_layout(make_config(family), task_of(family))


def make_micro(task: Task, seed: int, rows: int = 4, longest: int = 9) -> MicroBatch:
    """A random micro-batch, padded on the right."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, longest, rows).astype(np.int32)
    lengths[0] = longest
    ids = generator.integers(3, VOCAB, (rows, longest)).astype(np.int64)
    is_real = np.arange(longest)[None, :] < lengths[:, None]
    ids[~is_real] = 1
    if task == "sequence-classification":
        return MicroBatch(ids, lengths, generator.integers(0, CLASSES, rows).astype(np.int64))
    labels = np.where(is_real, ids, -100)
    labels[0, :2] = -100
    return MicroBatch(ids, lengths, labels)


def num_targets(micro: MicroBatch) -> int:
    """Targets of a micro-batch."""
    if micro.labels.ndim == 1:
        return len(micro.labels)
    return int((micro.labels[:, 1:] != -100).sum())
