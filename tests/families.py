"""Tiny configs of families whose blocks get more than a hidden state, or live in a larger model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from edge_sdk.model.layout import Task, auto_class, without_cache
from tests.tiny import CLASSES, VOCAB

BLOCKS = 4

_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 3}
_PER_LAYER = {
    **_GROUPED,
    **_MIXED,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
_ENCODER = {**_SIZE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MAMBA = {"mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
# A tower with as many blocks as the text model, and wider ones.
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# By name: model type, task, settings.
MORE: dict[str, tuple[str, Task, dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        "causal-lm",
        {"text_config": {**_GROUPED, **_MIXED}, "vision_config": _VISION},
    ),
    # Of these two transformers makes no AutoModelForCausalLM.
    "mistral3": (
        "mistral3",
        "causal-lm",
        {
            "text_config": {"model_type": "mistral", **_GROUPED},
            "vision_config": {"model_type": "pixtral", **_VISION},
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        "causal-lm",
        {
            "text_config": {
                **_GROUPED,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {"hidden_size": 16, "intermediate_size": 16, "depth": 1}
            | {"num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_5": ("qwen3_5", "causal-lm", {"text_config": {**_GROUPED, **_DELTA}}),
    "llama4": (
        "llama4",
        "causal-lm",
        {"text_config": {**_GROUPED, "num_local_experts": 2, "intermediate_size_mlp": 48}},
    ),
    "deepseek_v3": ("deepseek_v3", "causal-lm", {**_SIZE, **_EXPERTS, **_LATENT}),
    "glm4_moe": ("glm4_moe", "causal-lm", {**_GROUPED, **_EXPERTS}),
    "lfm2_moe": (
        "lfm2_moe",
        "causal-lm",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"] * 2,
        },
    ),
    "minimax": (
        "minimax",
        "causal-lm",
        {
            **_GROUPED,
            "num_local_experts": 2,
            "block_size": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "apertus": ("apertus", "causal-lm", _GROUPED),
    "gemma4": (
        "gemma4_text",
        "causal-lm",
        {**_PER_LAYER, "global_head_dim": 8, "num_global_key_value_heads": 2},
    ),
    "gemma3n": (
        "gemma3n_text",
        "causal-lm",
        {
            **_PER_LAYER,
            "laurel_rank": 4,
            "intermediate_size": [48] * BLOCKS,
            "activation_sparsity_pattern": [0.0] * BLOCKS,
        },
    ),
    "deepseek_v4": ("deepseek_v4", "causal-lm", {**_GROUPED, **_EXPERTS, "num_hash_layers": 2}),
    # Its head is made before its embeddings.
    "xlm_roberta": ("xlm-roberta", "causal-lm", {**_ENCODER, "is_decoder": True}),
    "mpnet": ("mpnet", "sequence-classification", _ENCODER),
    "roformer": ("roformer", "sequence-classification", _ENCODER),
    "deberta": (
        "deberta-v2",
        "sequence-classification",
        {
            **_ENCODER,
            "relative_attention": True,
            "position_buckets": 8,
            "conv_kernel_size": 3,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "xlnet": (
        "xlnet",
        "sequence-classification",
        {"vocab_size": VOCAB, "d_model": 32, "n_layer": BLOCKS, "n_head": 4, "d_inner": 48}
        | {"dropout": 0.0, "summary_last_dropout": 0.0},
    ),
    "openai": (
        "openai-gpt",
        "causal-lm",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
    ),
    "mamba": (
        "mamba",
        "causal-lm",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": BLOCKS, "state_size": 4},
    ),
    "mamba2": (
        "mamba2",
        "causal-lm",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": BLOCKS,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
    "rwkv": (
        "rwkv",
        "causal-lm",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": BLOCKS}
        | {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64},
    ),
    "jamba": (
        "jamba",
        "causal-lm",
        {
            **_GROUPED,
            "num_experts": 2,
            "mamba_d_state": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "bamba": (
        "bamba",
        "causal-lm",
        {**_GROUPED, **_MAMBA, "mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    ),
    "zamba2": (
        "zamba2",
        "causal-lm",
        {
            **_SIZE,
            "mamba_d_state": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "hybrid"] * 2,
        },
    ),
}


def more_config(name: str, **changes: Any) -> Any:
    """The config of a tiny model."""
    kind, task, settings = MORE[name]
    classes = {} if task == "causal-lm" else {"num_labels": CLASSES}
    config = AutoConfig.for_model(kind, **{**settings, **classes, **changes})
    config.pad_token_id = config.get_text_config().pad_token_id = 1
    return without_cache(config)


def more_model(name: str, config: Any) -> nn.Module:
    """The whole model; no weight and no stored number is as it was initialised."""
    factory = auto_class(config, MORE[name][1])
    torch.manual_seed(0)
    model: nn.Module = factory.from_config(copy.deepcopy(config)).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() > 1:
            tensor.add_(torch.randn(tensor.shape) * 0.05)
    return model
