"""Plain models whose weights are what a quantised or rounded base stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_sdk.model.experts import expert_weights
from edge_sdk.model.layout import Layout
from edge_sdk.model.precision import Base
from edge_sdk.model.quantized import Quantized, pack, unpack


def keep_as(
    model: nn.Module, layout: Layout, base: Base, first: int = 0, stop: int | None = None
) -> None:
    """Let blocks first .. stop-1 compute with what *base* keeps of their weights.

    In 8 or 4 bits: of linear layers and experts, in place. In 16 bits all weights of the model get
    that dtype. Adapters stay as they are.
    """
    if base in ("bfloat16", "float16"):  # buffers stay: rotary tables are of float32
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(getattr(torch, base))
    if base not in ("int8", "int4"):
        return
    kind: Any = base
    blocks: Any = model.get_submodule(layout.blocks_path)
    experts = expert_weights(model)
    for index, block in list(enumerate(blocks))[first:stop]:
        own = (module for name, module in block.named_modules() if ".lora_" not in name)
        for module in own:
            if type(module) is nn.Linear:
                _round(module.weight.data, kind)
            elif type(module) is Conv1D:
                _round(module.weight.data.T, kind)
        for name, weight in experts.items():
            if name.startswith(f"{layout.blocks_path}.{index}."):
                owner = model.get_submodule(name.rpartition(".")[0])
                turned = getattr(owner, "is_transposed", False)
                for matrix in weight.data:
                    _round(matrix.T if turned else matrix, kind)


def _round(w_OI: torch.Tensor, kind: Quantized) -> None:
    """Let a matrix be what its codes stand for."""
    w_OI.copy_(unpack(*pack(w_OI.contiguous(), kind), w_OI.shape[1]))
