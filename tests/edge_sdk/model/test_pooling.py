"""A classification head looks where transformers looks, whatever the text holds.

transformers' decoders pool at the rightmost token that is not the padding token, be that padding or
part of the text; encoders pool at the first token or at all of them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from coordinator.onnx_export.export import export_slice
from coordinator.onnx_export.job import ExportJob
from edge_sdk.data.batches import MicroBatch, pad, pooled_positions
from edge_sdk.data.tokenize import Example
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import Layout, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.model.weights import load_config
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.interface import Runtime
from edge_sdk.runtime.onnx_runtime import OnnxRuntime
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import save_model
from tests.runtimes import stored_parts
from tests.tiny import make_model, make_parts

PAD, END, BLOCKS, CLASSES = 1, 2, 2, 3
_SIZE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": END,
    "num_labels": CLASSES,
}
_DRY = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout")}
_DRY |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_positions": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "phi": {},
    "bert": {},
    "roberta": {"max_position_embeddings": 24},
}
TEXTS = {
    "no padding token": [[5, 6, 7, 8, 9], [5, 6], [7]],
    "inside": [[5, PAD, 7, 8, 9], [PAD, 6, 4], [8, PAD, PAD, 4]],
    "at the end": [[5, 6, 7, 8, PAD], [5, 6, PAD, PAD], [8, 7]],
    "inside and at the end": [[5, PAD, 7, PAD, 4], [5, PAD, 6, PAD], [PAD, 7, PAD]],
    "nothing else": [[PAD, PAD, PAD], [PAD], [5, 6, 7, 8], [9, PAD]],
}
# Where a tokenizer has no padding token, the end of a text usually takes its place.
PADS = {"own": PAD, "eos": END}


@cache
def known(family: str, pad_id: int) -> tuple[Any, Layout, nn.Module]:
    """Config, layout and whole model of a tiny classifier."""
    settings = {**_SIZE, **_DRY, **FAMILIES[family], "pad_token_id": pad_id}
    config = AutoConfig.for_model(family, **settings)
    config.use_cache = False
    layout = find_layout(config, "sequence-classification")
    return config, layout, make_model(config, "sequence-classification").eval()


def batch(name: str, pad_id: int) -> MicroBatch:
    """The texts of that name, padded as a device does it."""
    rows = [[pad_id if token == PAD else token for token in row] for row in TEXTS[name]]
    return pad(
        [Example(np.array(r, np.int32), i % CLASSES, "") for i, r in enumerate(rows)], pad_id
    )


def by_transformers(model: nn.Module, micro: MicroBatch) -> torch.Tensor:
    """The logits of whoever calls the model with ids and attention mask."""
    ids_BT = torch.from_numpy(micro.input_ids)
    is_real_BT = torch.arange(ids_BT.shape[1]) < torch.from_numpy(micro.lengths)[:, None]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids_BT, attention_mask=is_real_BT.long()).logits
    return logits


@pytest.mark.parametrize("pad_id", PADS.values(), ids=PADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_classifier_pools_where_the_whole_one_does(family: str, pad_id: int) -> None:
    """Whoever has no ids gets the whole model's logits from hidden states and positions."""
    config, layout, model = known(family, pad_id)
    slice_ = Slice(config, "sequence-classification", layout, torch.float32)
    for name, tensors in make_parts(model, layout, list(layout.part_names())).items():
        slice_.add(name, tensors)
    slice_.model.eval()
    for name in TEXTS:
        micro = batch(name, pad_id)
        assert micro.pooled is not None
        ids_BT, lengths_B, pooled_B = map(
            torch.from_numpy, (micro.input_ids, micro.lengths, micro.pooled)
        )
        for split in range(1, BLOCKS + 1):
            with torch.no_grad():
                hidden_BTD = slice_.front(ids_BT, lengths_B, split)
                found = slice_.logits(hidden_BTD, lengths_B, split, pooled_B)

            assert torch.equal(found, by_transformers(model, micro)), (name, split)


@cache
def runtimes(family: str) -> dict[str, Runtime]:
    """A device with the whole model, on each backend."""
    config, layout, model = known(family, PAD)
    parts = make_parts(model, layout, list(layout.part_names()))
    plan = Plan(split=BLOCKS, ranks={}, alphas={}, batch_size=3, micro_batch=3, tail=True)
    job = ExportJob(
        task="sequence-classification",
        num_labels=CLASSES,
        split=BLOCKS,
        tail=True,
        measures=False,
        targets={},
        dtypes={n: "float32" for tensors in parts.values() for n in tensors},
    )
    task: Any = "sequence-classification"
    common = (plan, LoraConfig(), TrainingConfig(), 10)
    return {
        "torch": TorchRuntime(config, task, layout, parts, *common, device="cpu"),
        "onnxruntime": OnnxRuntime(
            export_slice(config, job, layout), stored_parts(parts), *common, threads=1
        ),
    }


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_device_with_the_head_pools_where_transformers_does(backend: str, name: str) -> None:
    """Its loss is that of the whole model, in training and in evaluation."""
    runtime, micro = runtimes("llama")[backend], batch(name, PAD)
    logits = by_transformers(known("llama", PAD)[2], micro)
    expected = nn.functional.cross_entropy(logits, torch.from_numpy(micro.labels), reduction="sum")

    hidden = runtime.forward_eval(micro)

    assert runtime.tail_eval(hidden, micro).loss_sum == pytest.approx(float(expected), rel=1e-5)
    assert runtime.tail(hidden, micro, 3)[0].loss_sum == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("pad_id", [PAD, 0, -1])
def test_positions_are_those_of_transformers(pad_id: int) -> None:
    """The rightmost token that is not the padding token; the first where there is none."""
    ids_BT = np.array([[0, 5, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [5, 6, 7, 0]])
    order_T = torch.arange(4, dtype=torch.int32)

    expected = (order_T * (torch.from_numpy(ids_BT) != pad_id)).argmax(-1)

    assert pooled_positions(ids_BT, pad_id).tolist() == expected.tolist()


PADDING = [
    ("its own", {"pad_token_id": 7}, "<pad>", 7),
    ("the tokenizer's", {"pad_token_id": None}, "<pad>", 1),
    ("of no row", {"pad_token_id": -1}, "<pad>", 1),
    ("beyond the rows", {"pad_token_id": 97}, "<pad>", 1),
    ("the end of a text", {"pad_token_id": None, "eos_token_id": 2}, None, 2),
    ("the first of several ends", {"pad_token_id": None, "eos_token_id": [5, 6]}, None, 5),
    ("none at all", {"pad_token_id": None, "eos_token_id": None}, None, 0),
]


@pytest.mark.parametrize(("name", "said", "tokenizers", "expected"), PADDING)
def test_a_classifier_pads_as_its_tokenizer_does(
    name: str, said: dict[str, Any], tokenizers: str | None, expected: int, tmp_path: Path
) -> None:
    """A config without a usable padding token takes the tokenizer's, else an end of text."""
    folder = save_model("llama", tmp_path)
    for file, changes in (
        ("config.json", said),
        ("tokenizer_config.json", {"pad_token": tokenizers}),
    ):
        text = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(text))

    assert load_config(folder, CLASSES).pad_token_id == expected
    assert load_config(folder, 0).pad_token_id in (None, expected)
