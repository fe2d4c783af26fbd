"""An adapter for llama.cpp: by its own converter, read back by the gguf package.

Where llama.cpp is not installed (`LLAMA_CPP`, or the search path) a stand-in converts.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from coordinator.export import gguf_adapter
from coordinator.export.check import ExportError
from coordinator.export.gguf_adapter import ADAPTER_FILE, export_gguf
from coordinator.export.needs import CONVERTER, find_converter
from edge_sdk.errors import ModelError
from edge_sdk.lora.factors import zero
from tests.coordinator.export import convert_lora_to_gguf
from tests.coordinator.export.results import TOLERANCE, Result, add, difference

STAND_IN = Path(convert_lora_to_gguf.__file__)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def converter_of(which: str) -> Path:
    """A converter, or a skipped test."""
    if which == "stand-in":
        return STAND_IN
    if not os.environ.get("LLAMA_CPP") and shutil.which(CONVERTER) is None:
        pytest.skip("llama.cpp is not installed: neither LLAMA_CPP nor the search path has it")
    return find_converter(None)


def read(path: Path, model: Any) -> Any:
    """*model* with the adapter in a file added as llama.cpp adds it: alpha / the tensor's rank."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    ours = {theirs: own for own, theirs in convert_lora_to_gguf.NAMES.items()}
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, a_RI in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        _, block, theirs, *_ = name.split(".")
        b_OR = tensors[name.replace(".lora_a", ".lora_b")]
        if theirs in heads:  # pairs become halves again
            pairs = b_OR.reshape(heads[theirs], -1, 2, b_OR.shape[1])
            b_OR = pairs.swapaxes(1, 2).reshape(b_OR.shape)
        change = torch.from_numpy(alpha / a_RI.shape[0] * (b_OR @ a_RI))
        add(model, f"model.layers.{block}.{ours[theirs]}", change)
    return model


@pytest.mark.parametrize("which", ["stand-in", "llama.cpp"])
def test_llama_cpp_s_reading_is_the_coordinator_s_model(which: str, tmp_path: Path) -> None:
    """Names, order of rows and scale as llama.cpp has them give the same logits."""
    trained = Result("llama", tmp_path / "base")
    out = tmp_path / "out"

    found = export_gguf(trained.source, trained.learned, out, converter_of(which), trained.facts)

    assert found <= TOLERANCE
    model = read(out / ADAPTER_FILE, trained.base())
    assert difference(trained.logits(model), trained.expected()) <= TOLERANCE
    lines = (out / "Modelfile").read_text().splitlines()
    assert [line for line in lines if line[0] != "#"] == [
        "FROM ./base.gguf",
        f"ADAPTER ./{ADAPTER_FILE}",
    ]
    assert str(tmp_path).encode() not in (out / ADAPTER_FILE).read_bytes()


def test_a_run_that_learned_nothing_is_converted(tmp_path: Path) -> None:
    """Zeros are of size zero."""
    trained = Result("llama", tmp_path / "base")
    nothing = {n: zero(f.b_OR.shape[0], f.a_RI.shape[1]) for n, f in trained.learned.items()}

    assert export_gguf(trained.source, nothing, tmp_path / "out", STAND_IN) == 0.0


def test_a_converter_that_loses_a_weight_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not in the file is missed."""
    trained = Result("llama", tmp_path / "base")
    whole = gguf_adapter._size
    monkeypatch.setattr(gguf_adapter, "_size", lambda path: 0.99 * whole(path))

    with pytest.raises(ExportError, match="has not taken all of the adapter"):
        export_gguf(trained.source, trained.learned, tmp_path / "out", STAND_IN)


def test_the_size_is_that_of_all_changes(tmp_path: Path) -> None:
    """As a dense computation has it."""
    trained = Result("llama", tmp_path / "base")
    export_gguf(trained.source, trained.learned, tmp_path / "out", STAND_IN)

    dense = [float(np.sum(f.dense().astype(np.float64) ** 2)) for f in trained.learned.values()]

    found = gguf_adapter._size(tmp_path / "out" / ADAPTER_FILE)
    assert found == pytest.approx(math.sqrt(sum(dense)), rel=1e-6)


def test_what_the_converter_does_not_know_is_one_line(tmp_path: Path) -> None:
    """Its own last words."""
    trained = Result("qwen3", tmp_path / "base")

    with pytest.raises(
        ModelError, match="failed: Model Qwen3ForCausalLM is not supported"
    ) as error:
        export_gguf(trained.source, trained.learned, tmp_path / "out", STAND_IN)

    assert error.value.exit_code == 8


def test_transposed_weights_are_refused(tmp_path: Path) -> None:
    """The converter would turn adapters of GPT-2 as it turns weights, which is wrong for them."""
    trained = Result("gpt2", tmp_path / "base")

    with pytest.raises(ModelError, match="gpt2 keeps its weights transposed.*--format merged"):
        export_gguf(trained.source, trained.learned, tmp_path / "out", STAND_IN)
