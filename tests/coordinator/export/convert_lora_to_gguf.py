"""Stands in for llama.cpp's converter of the same name: the same options, Llama models alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def turned(b_OR: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head in llama.cpp's order for rotary positions: halves become pairs."""
    halves = b_OR.reshape(num_heads, 2, -1, b_OR.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(b_OR.shape))


def main() -> None:
    """Convert an adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype")
    parser.add_argument("--base", type=Path)
    parser.add_argument("adapter", type=Path)
    options = parser.parse_args()
    base = json.loads((options.base / "config.json").read_text())
    if base["architectures"] != ["LlamaForCausalLM"]:
        raise SystemExit(f"Model {base['architectures'][0]} is not supported")
    config = json.loads((options.adapter / "adapter_config.json").read_text())
    heads = {
        "attn_q": base["num_attention_heads"],
        "attn_k": base["num_key_value_heads"],
    }
    writer = gguf.GGUFWriter(options.outfile, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for key, value in load_file(options.adapter / "adapter_model.safetensors").items():
        _, _, _, _, block, *rest = key.split(".")
        name = NAMES[".".join(rest[:2])]
        if rest[2] == "lora_B" and name in heads:
            value = turned(value, heads[name])
        writer.add_tensor(f"blk.{block}.{name}.weight.{rest[2].lower()}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
