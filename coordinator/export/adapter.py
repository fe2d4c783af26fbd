"""The result as an adapter in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from coordinator.export.check import load_base, verify
from edge_sdk.files import storage_errors
from edge_sdk.lora.factors import Array, Factors, compress
from edge_sdk.model.layout import is_transposed
from edge_sdk.model.weights import ModelSource


def export_adapter(
    source: ModelSource, learned: Mapping[str, Factors], head: Mapping[str, Array], folder: Path
) -> float:
    """Write *learned* as a PEFT adapter; return the largest difference of a logit.

    The ranks are those of dW, weight by weight (`rank_pattern`), with scale 1.

    Raises:
        ExportError: PEFT, given the export, computes something else.
        StorageError: the folder cannot be written.
    """
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel
    from safetensors.torch import save_file

    kept = {n: compress(f)[0] for n, f in learned.items()}
    kept = {n: f for n, f in kept.items() if f.rank} or _smallest(learned)
    ranks = {name: factors.rank for name, factors in kept.items()}
    modules = sorted({name.split(".")[0] for name in head})
    config = PeftConfig(
        task_type="CAUSAL_LM" if source.task == "causal-lm" else "SEQ_CLS",
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        modules_to_save=modules or None,
        base_model_name_or_path=str(source.folder),
        fan_in_fan_out=_has_transposed(source),
        inference_mode=True,
    )
    tensors = {f"base_model.model.{n}": torch.from_numpy(np.array(v)) for n, v in head.items()}
    for name, factors in kept.items():
        for letter, value in (("A", factors.a_RI), ("B", factors.b_OR)):
            key = f"base_model.model.{name}.lora_{letter}.weight"
            tensors[key] = torch.from_numpy(np.ascontiguousarray(value))
    with storage_errors(f"adapter {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        (folder / "README.md").write_text(_card(source, ranks), encoding="utf-8")
    loaded = PeftModel.from_pretrained(load_base(source), folder)
    return verify(source, learned, head, loaded, folder)


def _smallest(learned: Mapping[str, Factors]) -> dict[str, Factors]:
    """Make a zero adapter of rank 1, for a run that has learned nothing."""
    name, factors = next(iter(learned.items()))
    b_OR, a_RI = np.zeros((factors.b_OR.shape[0], 1)), np.zeros((1, factors.a_RI.shape[1]))
    return {name: Factors(b_OR.astype(np.float32), a_RI.astype(np.float32))}


def _has_transposed(source: ModelSource) -> bool:
    from edge_sdk.model.layout import build_empty

    model = build_empty(source.config, source.task, torch.float32)
    return any(is_transposed(module) for module in model.modules())


def _card(source: ModelSource, ranks: Mapping[str, int]) -> str:
    config = json.dumps({"weights": len(ranks), "ranks": sorted(set(ranks.values()))})
    return (
        "---\nlibrary_name: peft\ntags: [lora, edgesplit]\n---\n\n"
        "# LoRA adapter trained with EdgeSplit\n\n"
        f"Base model: `{source.folder.name}`. Task: {source.task}. Adapted: `{config}`.\n\n"
        "Trained across devices that kept their data; the adapter is the sum of what all of them\n"
        "learned. Load it with `peft.PeftModel.from_pretrained(base, this_folder)`.\n"
    )
