"""A merged classifier, called in the usual way, gives each text of a batch its own answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from coordinator.export.merged import export_merged
from edge_sdk.lora.factors import Factors
from edge_sdk.model.weights import ModelSource
from tests.e2e.cluster import save_model

TEXTS = ["a boat on the river", "the<pad>", "bird</s></s>", "</s>", "x"]
# What the config says, and what the tokenizer pads with.
PADDING = [(None, "<pad>"), (None, None), (1, "<pad>"), (2, "<pad>"), (1, None)]


@pytest.mark.parametrize(("said", "tokenizers"), PADDING)
def test_padding_changes_no_answer(
    said: int | None, tokenizers: str | None, tmp_path: Path
) -> None:
    """The folder's tokenizer pads with the token by which the folder's model pools."""
    folder = save_model("llama", tmp_path / "base")
    for file, changes in (
        ("config.json", {"pad_token_id": said}),
        ("tokenizer_config.json", {"pad_token": tokenizers}),
    ):
        text = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(text))
    source = ModelSource(str(folder), "sequence-classification", num_labels=3)
    source.load_whole(0)
    name = "model.layers.0.self_attn.q_proj"
    learned = {name: Factors(np.ones((32, 1), np.float32), np.ones((1, 32), np.float32))}
    head = {"score.weight": source.tensors("tail")["score.weight"].numpy()}
    export_merged(source, learned, head, tmp_path / "merged")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        together = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        alone = [model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]

    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert model.config.pad_token_id == source.config.pad_token_id
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
