"""Decoders with a classification head learn what the exported model computes, pads in texts too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from coordinator.config.run import DeviceSettings, EvaluationConfig
from edge_sdk.data.rows import DataConfig
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import Cluster, wait_all, write_rows
from tests.tiny import BLOCKS

NAMES = ("red", "green")
ROWS = [
    {"text": "a boat<pad><pad>", "label": "red"},
    {"text": "the<pad>river", "label": "green"},
    {"text": "bird", "label": "red"},
    {"text": "<pad>", "label": "green"},
]


def transformers_loss(folder: Path, seed: int) -> float:
    """The mean loss of the untrained model, called as anybody would call it."""
    source = ModelSource(str(folder), "sequence-classification", num_labels=len(NAMES))
    source.load_whole(seed)
    model: Any = AutoModelForSequenceClassification.from_config(source.config).eval()
    state = {n: t for p in source.layout.part_names() for n, t in source.tensors(p).items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(F.cross_entropy(logits, torch.tensor([NAMES.index(r["label"]) for r in ROWS])))


@pytest.mark.parametrize("labels", ["server", "device"])
def test_the_loss_is_that_of_transformers(cluster: Cluster, labels: str) -> None:
    """Wherever the labels are: on the devices, cut and whole, and in both kinds of evaluation."""
    data = DataConfig(labels=NAMES)
    shard = write_rows(cluster.folder / "dev.jsonl", ROWS)
    config = cluster.config(
        task="sequence-classification",
        label_names=NAMES,
        labels=labels,
        rounds=1,
        steps_per_round=1,
        default=DeviceSettings(split=2, batch_size=len(ROWS), codec="float32"),
        devices={"b": DeviceSettings(split=BLOCKS)},
        training=TrainingConfig(learning_rate=1e-12),
        evaluation=EvaluationConfig(data=DataConfig(path=str(shard), labels=NAMES)),
    )
    serving = cluster.serve(config).start()
    clients = [cluster.client(n, ROWS, data=data).start() for n in "abc"]
    assert serving.wait() == "completed"
    wait_all(clients)

    expected = transformers_loss(cluster.model, config.training.seed)

    row = serving.rows[-1]
    assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["eval"]["loss"] == pytest.approx(expected, rel=1e-5)
