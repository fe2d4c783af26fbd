"""The uniform adapter means the same to every reader; PEFT's own patterns do not.

The readers here share no code with what writes: each does what its program does with the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from coordinator.export.adapter import VLLM_RANKS, export_adapter, export_uniform, vllm_rank
from coordinator.export.check import load_base, trained_slice
from coordinator.export.peft_names import pad
from edge_sdk.errors import ConfigError
from edge_sdk.lora.factors import Factors
from tests.coordinator.export.results import TOLERANCE, Result, add, difference

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Scale = Callable[[dict[str, Any], int], float]


def as_vllm(config: dict[str, Any], _rank: int) -> float:
    """One rank and one alpha for all weights, both from the config; patterns are passed over."""
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank))


def as_llama_cpp(config: dict[str, Any], rank: int) -> float:
    """The converter keeps the config's one alpha, which is divided by the tensor's own rank."""
    return float(config["lora_alpha"] / rank)


def read(folder: Path, model: Any, scale: Scale) -> Any:
    """*model* with the adapter in *folder* added to its weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a_RI in tensors.items():
        if key.endswith(".lora_A.weight"):
            b_OR = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            add(model, name, scale(config, a_RI.shape[0]) * (b_OR @ a_RI))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_every_reader_has_the_coordinator_s_logits(family: str, tmp_path: Path) -> None:
    """Of the uniform adapter vLLM's, llama.cpp's and PEFT's reading is the model itself."""
    trained = Result(family, tmp_path / "base")
    folder = tmp_path / "out"

    assert export_uniform(trained.source, trained.learned, folder) <= TOLERANCE

    ours = trained.logits(trained_slice(trained.source, trained.learned, {}).model)
    for scale in (as_vllm, as_llama_cpp):
        found = trained.logits(read(folder, trained.base(), scale))
        assert difference(found, ours) <= TOLERANCE
    by_peft = peft.PeftModel.from_pretrained(load_base(trained.source), folder)
    assert difference(trained.logits(by_peft), ours) <= TOLERANCE


def test_the_uniform_adapter_has_one_rank_and_one_alpha(tmp_path: Path) -> None:
    """The config names no pattern, and every tensor has the config's rank, one that vLLM takes."""
    trained = Result("llama", tmp_path / "base")

    export_uniform(trained.source, trained.learned, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {8}
    assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {8}


def test_patterns_are_lost_on_a_reader_of_one_alpha(tmp_path: Path) -> None:
    """Why there is a uniform form: llama.cpp's reading of PEFT's patterns is another model."""
    trained = Result("llama", tmp_path / "base")
    export_adapter(trained.source, trained.learned, {}, tmp_path / "out")

    found = trained.logits(read(tmp_path / "out", trained.base(), as_llama_cpp))

    assert difference(found, trained.expected()) > 100 * TOLERANCE
    # vLLM reads the scale as 1 because the largest rank is also alpha: luck, and kept.
    found = trained.logits(read(tmp_path / "out", trained.base(), as_vllm))
    assert difference(found, trained.expected()) <= TOLERANCE


@pytest.mark.parametrize("rank", [1, 8, 9, 16, 17, 48, 64, 65, 257, 512])
def test_a_rank_is_the_least_that_vllm_takes(rank: int) -> None:
    """Never less than is needed, and never a step more."""
    found = vllm_rank(rank)

    assert found in VLLM_RANKS
    assert found >= rank
    assert not [allowed for allowed in VLLM_RANKS if rank <= allowed < found]


def test_a_rank_beyond_vllm_is_refused() -> None:
    """The line names the option that helps."""
    with pytest.raises(ConfigError, match="at most 512; cut it with --max-rank 512"):
        vllm_rank(513)


def test_padding_is_exact() -> None:
    """More ranks of zeros are the same matrix to the bit."""
    draw = np.random.default_rng(0)
    factors = Factors(
        draw.normal(size=(5, 3)).astype(np.float32), draw.normal(size=(3, 4)).astype(np.float32)
    )

    padded = pad(factors, 8)

    assert padded.rank == 8
    assert torch.equal(torch.from_numpy(padded.b_OR[:, 3:]), torch.zeros(5, 5))
    np.testing.assert_array_equal(padded.b_OR[:, :3] @ padded.a_RI[:3], factors.dense())
