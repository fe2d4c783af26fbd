"""The whole model with what was learned merged in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coordinator.export.check import load_base, verify
from edge_sdk.files import storage_errors
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.model.layout import is_transposed
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.torch_runtime import load_parameters


def export_merged(
    source: ModelSource, learned: Mapping[str, Factors], head: Mapping[str, Array], folder: Path
) -> float:
    """Write the whole model, *learned* added to its weights; return what `export_adapter` does."""
    from transformers import AutoTokenizer

    model: Any = load_base(source)
    with torch.no_grad():
        for name, factors in learned.items():
            weight = model.get_submodule(name).weight
            change = torch.from_numpy(factors.dense()).to(weight.dtype)
            weight += change.T if is_transposed(model.get_submodule(name)) else change
    load_parameters({n: model.get_parameter(n) for n in head}, head)
    with storage_errors(f"model {folder}"):
        model.save_pretrained(folder)
        if any(source.folder.glob("tokenizer*")):
            AutoTokenizer.from_pretrained(source.folder).save_pretrained(folder)
    factory = type(model)
    loaded = factory.from_pretrained(folder, dtype=torch.float32)
    return verify(source, learned, head, loaded, folder)
