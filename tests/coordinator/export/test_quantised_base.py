"""An export of a run on a checkpoint in few bits is compared with that checkpoint, made dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.export.check import load_base
from edge_sdk.model.weights import ModelSource
from tests.edge_sdk.model.test_checkpoint import QUANTISED, Rewrite, changed, saved, written


@pytest.mark.parametrize(("family", "rewrite", "said"), QUANTISED)
def test_the_base_of_an_export_is_what_was_trained_on(
    family: str, rewrite: Rewrite, said: dict[str, Any], tmp_path: Path
) -> None:
    """Every weight, to the bit: transformers makes the checkpoint dense as the run did."""
    torch.manual_seed(2)
    written(dict(rewrite(saved(family, tmp_path))), tmp_path)
    changed(tmp_path, dtype="bfloat16", quantization_config=said)
    source = ModelSource(str(tmp_path), "causal-lm")

    found = load_base(source).state_dict()

    for part in source.layout.part_names():
        for name, tensor in source.tensors(part).items():
            assert torch.equal(found[name], tensor.float()), name
