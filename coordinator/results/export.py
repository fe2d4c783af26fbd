"""Hand the result out: a standard PEFT adapter, or the whole model with it merged in.

Every export is read back and compared by its logits before it is called done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coordinator.aggregation.ledger import Ledger
from coordinator.config.run import ServeConfig
from coordinator.results.run_folder import CONFIG, RunFolder
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.files import storage_errors
from edge_sdk.lora.adapters import Adapters
from edge_sdk.lora.factors import Array, Factors, compress
from edge_sdk.lora.targets import LoraConfig, ModelFacts, find_targets
from edge_sdk.model.layout import is_transposed
from edge_sdk.model.partition import Slice
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.torch_runtime import load_parameters

log = logging.getLogger(__name__)

# Largest difference of a logit between the coordinator's model and the export read back.
TOLERANCE = 1e-5


class ExportError(EdgeError):
    """The export, read back, is not the model that was trained."""


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
    return _verify(source, learned, head, loaded, folder)


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
    return _verify(source, learned, head, loaded, folder)


def load_base(source: ModelSource) -> nn.Module:
    """Load the whole model in float32, as transformers does."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    factory: Any = AutoModelForCausalLM
    if source.task == "sequence-classification":
        factory = AutoModelForSequenceClassification
    model: nn.Module = factory.from_pretrained(
        source.folder, config=source.config, dtype=torch.float32
    )
    return model


def trained_slice(
    source: ModelSource, learned: Mapping[str, Factors], head: Mapping[str, Array]
) -> Slice:
    """Load the whole model as the coordinator computes it: the base, and dW as factors."""
    slice_ = Slice(source.config, source.task, source.layout, torch.float32)
    for part in source.layout.part_names():
        slice_.add(part, source.tensors(part))
    adapters = Adapters(slice_, {}, {}, LoraConfig())
    adapters.set_residual(learned)
    load_parameters({n: slice_.model.get_parameter(n) for n in head}, head)
    slice_.model.eval()
    return slice_


def _verify(
    source: ModelSource,
    learned: Mapping[str, Factors],
    head: Mapping[str, Array],
    loaded: nn.Module,
    folder: Path,
) -> float:
    ours = trained_slice(source, learned, head)
    vocab = source.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, vocab, (2, 16), generator=generator)
    lengths_B = torch.tensor([16, 16])
    with torch.no_grad():
        expected = ours.whole(ids_BT, lengths_B)
        found = loaded.eval()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{folder}: read back, its logits differ by {difference:.1e} (relative), "
            f"more than {TOLERANCE:.0e}"
        )
    log.info("export.verified folder=%s difference=%.1e", folder, difference)
    return difference


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


def export_run(run: RunFolder, folder: Path, *, merged: bool) -> float:
    """Export the newest checkpoint of *run*; return the largest difference of a logit.

    Raises:
        ConfigError: the run has not finished a round yet.
    """
    config = load_config(ServeConfig, run.path / CONFIG, env={})
    source = ModelSource(
        config.model, config.task, num_labels=len(config.label_names), revision=config.revision
    )
    source.load_whole(config.training.seed)
    targets = find_targets(source.config, config.task, source.layout, config.lora)
    facts = ModelFacts(source.layout, targets)
    ledger = Ledger(facts, config.lora, config.aggregation, None, config.training.seed)
    checkpoint = run.load_checkpoint()
    for damage in checkpoint.damaged:
        log.warning("checkpoint.damaged path=%s reason=%s", damage.checkpoint, damage.reason)
    ledger.load_state(checkpoint.arrays["ledger"])
    learned = ledger.global_factors()
    if not learned:
        raise ConfigError(f"{run.path} has not finished a round yet; there is nothing to export")
    write = export_merged if merged else export_adapter
    return write(source, learned, ledger.head, folder)
