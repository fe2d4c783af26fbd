"""An export, read back, must compute what the coordinator's model computes.

Legend: B sequences, T positions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_sdk.errors import EdgeError
from edge_sdk.lora.adapters import Adapters
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.partition import Slice
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.torch_runtime import load_parameters

log = logging.getLogger(__name__)

# Largest difference of a logit between the coordinator's model and the export read back.
TOLERANCE = 1e-5


class ExportError(EdgeError):
    """The export, read back, is not the model that was trained."""


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


def verify(
    source: ModelSource,
    learned: Mapping[str, Factors],
    head: Mapping[str, Array],
    loaded: nn.Module,
    folder: Path,
) -> float:
    """Return the largest difference of a logit between *loaded* and what was trained.

    Raises:
        ExportError: it is more than rounding.
    """
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
