"""The result as an adapter in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from coordinator.export.card import Card, base_name
from coordinator.export.check import ExportError, verify
from coordinator.export.facts import RunFacts
from coordinator.export.peft_names import as_peft, pad
from coordinator.results.json_text import json_text
from edge_sdk.errors import ConfigError
from edge_sdk.files import private_files, storage_errors
from edge_sdk.lora.factors import Array, Factors, compress, zero_like
from edge_sdk.model.layout import build_empty, is_transposed
from edge_sdk.model.safetensors_files import open_files
from edge_sdk.model.weights import ModelSource

LABELS = "labels.json"
"""A classifier's classes and pad token, which PEFT's own files have no place for."""
# What vLLM can be told to hold (`--max-lora-rank`), and what it holds unless it is told.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16


def export_adapter(
    source: ModelSource,
    learned: Mapping[str, Factors],
    head: Mapping[str, Array],
    folder: Path,
    facts: RunFacts | None = None,
) -> float:
    """Write *learned* as a PEFT adapter; return what `verify` does.

    The ranks are those of dW, weight by weight (`rank_pattern`), with scale 1.

    Raises:
        ExportError: PEFT, given the export, computes something else.
        StorageError: the folder cannot be written.
    """
    head = {**_drawn(source), **head}
    kept = least_ranks(learned)
    ranks = {name: factors.rank for name, factors in kept.items()}
    card = Card(source=source, format="peft", ranks=ranks, facts=facts)
    write_files(card, kept, head, folder)
    return verify(source, learned, head, folder)


def export_uniform(
    source: ModelSource, learned: Mapping[str, Factors], folder: Path, facts: RunFacts | None = None
) -> float:
    """Write the same for readers that know one rank and one alpha; return as `export_adapter` does.

    vLLM reads `r` and `lora_alpha` alone; llama.cpp divides alpha by a tensor's own rank. All
    weights get the same rank, with rows of zeros, and alpha equals it: everybody's scale is 1.

    Raises:
        ConfigError: the rank is more than vLLM takes.
        ExportError: PEFT, given the export, computes something else.
        StorageError: the folder cannot be written.
    """
    kept = least_ranks(learned)
    rank = vllm_rank(max(factors.rank for factors in kept.values()))
    padded = {name: pad(factors, rank) for name, factors in kept.items()}
    card = Card(source=source, format="vllm", ranks=dict.fromkeys(kept, rank), facts=facts)
    write_files(card, padded, {}, folder, is_uniform=True)
    return verify(source, learned, {}, folder)


def _drawn(source: ModelSource) -> dict[str, Array]:
    """Return what was drawn for this run, which nobody else could draw again."""
    tail = source.tensors("tail") if source.drawn else {}
    return {name: tail[name].float().numpy() for name in source.drawn}


def _saved_modules(source: ModelSource, head: Mapping[str, Array]) -> list[str]:
    """Return the modules that PEFT keeps as a whole: the head, and what was drawn beside it."""
    prefix = f"{build_empty(source.config, source.task, torch.float32).base_model_prefix}."
    return sorted({n.rpartition(".")[0] if n.startswith(prefix) else n.split(".")[0] for n in head})


def least_ranks(learned: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return what was learned with as few ranks as it has; a zero adapter where it is nothing."""
    kept = {n: compress(f)[0] for n, f in learned.items()}
    return {n: f for n, f in kept.items() if f.rank} or _smallest(learned)


def vllm_rank(rank: int) -> int:
    """Return the least rank of those that vLLM takes which holds *rank*.

    Raises:
        ConfigError: there is none.
    """
    fitting = [allowed for allowed in VLLM_RANKS if allowed >= rank]
    if not fitting:
        most = VLLM_RANKS[-1]
        raise ConfigError(
            f"--format vllm: the adapter has rank {rank}, vLLM takes at most {most}; "
            f"cut it with --max-rank {most} or less"
        )
    return fitting[0]


def write_files(
    card: Card,
    factors: Mapping[str, Factors],
    head: Mapping[str, Array],
    folder: Path,
    *,
    is_uniform: bool = False,
) -> None:
    """Write *factors* and a *head* in PEFT's format; *is_uniform*: see `as_peft`."""
    from safetensors.torch import save_file

    source, base = card.source, base_name(card.source)
    settings = {
        "task_type": "CAUSAL_LM" if source.task == "causal-lm" else "SEQ_CLS",
        "modules_to_save": (_saved_modules(source, head) if head else None),
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "fan_in_fan_out": has_transposed(source),
        "inference_mode": True,
    }
    model = build_empty(source.config, source.task, torch.float32)
    config, named = as_peft(model, factors, settings, is_uniform=is_uniform)
    tensors = {f"base_model.model.{n}": torch.from_numpy(np.array(v)) for n, v in head.items()}
    tensors |= {key: torch.from_numpy(value) for key, value in named.items()}
    with storage_errors(f"adapter {folder}"), private_files():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "adapter_model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        written = open_files([path], is_streamed=True)
        if lost := [n for n, t in tensors.items() if not torch.equal(written[n], t)]:
            raise ExportError(f"{path}: read back, {lost[0]} is not what was written")
        if card.label_names:
            (folder / LABELS).write_text(_labels(card), encoding="utf-8")


def _labels(card: Card) -> str:
    names = card.label_names
    pad_token_id = card.source.config.get_text_config().pad_token_id
    found = {
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "pad_token_id": pad_token_id,
    }
    return json_text(found, indent=2) + "\n"


def _smallest(learned: Mapping[str, Factors]) -> dict[str, Factors]:
    """Make a zero adapter of rank 1, for a run that has learned nothing."""
    name, factors = next(iter(learned.items()))
    return {name: zero_like(factors, 1)}


def has_transposed(source: ModelSource) -> bool:
    """Return whether the model keeps weights as (I, O), as GPT-2 does."""
    model = build_empty(source.config, source.task, torch.float32)
    return any(is_transposed(module) for module in model.modules())
