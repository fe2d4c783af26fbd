"""Runs on pooled data, and the loop that everybody writes, to hold them against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from coordinator.config.centralised import PooledConfig
from coordinator.config.run import EvaluationConfig, ServeConfig
from edge_sdk.data.batches import Batches
from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.data.tokenize import Example, ModelLimits, tokenize_rows
from edge_sdk.lora.adapters import initial_pair
from edge_sdk.lora.targets import LoraConfig, Shape
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import sentences, write_rows
from tests.tiny import CLASSES, VOCAB

SGD = TrainingConfig(optimizer="sgd", learning_rate=0.2, max_grad_norm=0.0)
ADAMW = TrainingConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.01, max_grad_norm=0.5)


def make_config(model: Path, folder: Path, **changes: Any) -> ServeConfig:
    """Two rounds of three steps of 6 sequences, in micro-batches of 2."""
    write_rows(folder / "dev.jsonl", sentences(9, 10))
    settings: dict[str, Any] = {
        "model": str(model),
        "trained_by": "coordinator",
        "pooled": PooledConfig(
            batch_size=6, micro_batch=2, trains=changes.pop("trains", "adapters")
        ),
        "runs": folder / "runs",
        "name": "run",
        "rounds": 2,
        "steps_per_round": 3,
        "lora": LoraConfig(r=4, lora_alpha=8),
        "training": ADAMW,
        "evaluation": EvaluationConfig(data=DataConfig(path=str(folder / "dev.jsonl"))),
        "device": "cpu",
        **changes,
    }
    return ServeConfig(**settings)


def tokenized(model: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Example]:
    """What the rows become."""
    config = DataConfig(**settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    limits = ModelLimits(vocab_size=VOCAB, num_labels=CLASSES if "labels" in settings else None)
    return tokenize_rows(load_rows(rows, config), tokenizer, config, limits)


def train_plainly(
    model: Any, trained: list[Any], config: ServeConfig, examples: list[Example]
) -> None:
    """A loop as everybody writes it, with the optimizer, clipping and schedule of torch."""
    training, pooled = config.training, config.pooled
    assert pooled.batch_size
    assert pooled.micro_batch
    batches = Batches(examples, pooled.batch_size, pooled.micro_batch, 0, "pooled", pad_id=1)
    optimizer: Any = torch.optim.SGD(trained, lr=training.learning_rate)
    if training.optimizer == "adamw":
        decay = training.weight_decay
        optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=decay)
    schedule = get_linear_schedule_with_warmup(optimizer, training.warmup_steps, config.total_steps)
    model.train()
    for parameter in trained:  # PEFT has frozen a classifier's head with the rest
        parameter.requires_grad_(True)
    for step in range(config.total_steps):
        batch = batches.at(step)
        for micro in batch.micro_batches:
            ids_BT = torch.from_numpy(micro.input_ids)
            mask_BT = torch.arange(ids_BT.shape[1])[None] < torch.from_numpy(micro.lengths)[:, None]
            labels = torch.from_numpy(micro.labels)
            loss = model(input_ids=ids_BT, attention_mask=mask_BT.long(), labels=labels).loss
            (loss * micro.num_targets / batch.num_targets).backward()
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def plain_lora(model: Any, config: ServeConfig, targets: Mapping[str, Shape]) -> dict[str, Any]:
    """Put PEFT's adapters into *model*, with our first values; returns the factors by name."""
    lora = config.lora
    settings = peft.LoraConfig(target_modules=list(targets), r=lora.r, lora_alpha=lora.lora_alpha)
    peft.inject_adapter_in_model(settings, model)
    factors = {}
    for name, shape in targets.items():
        pair = initial_pair(name, lora.r, shape, seed=0)
        for letter, value in (("A", pair.a_RI), ("B", pair.b_OR)):
            factors[f"{name}.{letter}"] = model.get_parameter(
                f"{name}.lora_{letter}.default.weight"
            )
            factors[f"{name}.{letter}"].data.copy_(torch.from_numpy(value))
    return factors


def plain_loss(model: Any, examples: list[Example]) -> float:
    """Mean loss per target, sequence by sequence."""
    total, targets = 0.0, 0
    for example in examples:
        ids_BT = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        labels_BT = torch.from_numpy(np.asarray(example.labels, dtype=np.int64))[None]
        count = int((labels_BT[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids_BT, labels=labels_BT).loss) * count
        targets += count
    return total / targets


def shard_files(folder: Path) -> tuple[str, ...]:
    """The files of two devices."""
    return tuple(str(write_rows(folder / f"{n}.jsonl", sentences(n))) for n in (1, 2))
