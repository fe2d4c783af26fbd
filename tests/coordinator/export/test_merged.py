"""The merged model is one that transformers loads by itself, and never lies in memory whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from coordinator.export import check, merged
from coordinator.export.check import ExportError
from coordinator.export.merged import export_merged
from edge_sdk.errors import NumericError
from edge_sdk.lora.factors import Factors
from edge_sdk.model.weights import ModelSource
from tests.coordinator.export.results import NAMES, TOLERANCE, Result
from tests.e2e.cluster import save_model
from tests.tiny import make_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder, as they lie on disk."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("is_large", [False, True])
def test_transformers_loads_it(
    family: str, is_large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base plus dW, the head included; a large model is in many files, and checked in part."""
    trained = Result(family, tmp_path / "base")
    if is_large:
        monkeypatch.setattr(merged, "SHARD_BYTES", 20_000)
        monkeypatch.setattr(check, "CHECK_BYTES", 0)
        monkeypatch.setattr(check, "load_base", None)

    found = export_merged(
        trained.source, trained.learned, trained.head, tmp_path / "out", trained.facts
    )

    monkeypatch.undo()
    assert found <= TOLERANCE
    assert (tmp_path / "out" / merged.INDEX).is_file() == is_large
    factory: Any = type(trained.base())
    trained.check(factory.from_pretrained(tmp_path / "out", dtype=torch.float32))


def test_files_are_filled_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file holds more than a shard, the index names each tensor once, nothing else is left."""
    monkeypatch.setattr(merged, "SHARD_BYTES", 20_000)
    trained = Result("llama", tmp_path / "base")

    export_merged(trained.source, trained.learned, {}, tmp_path / "out")

    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / merged.INDEX).read_text())
    last = len(files)
    assert files == [f"model-{n:05d}-of-{last:05d}.safetensors" for n in range(1, last + 1)]
    sizes: Counter[str] = Counter()
    for name in files:
        tensors = load_file(tmp_path / "out" / name)
        assert {index["weight_map"][key] for key in tensors} == {name}
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
    assert max(sizes.values()) <= 20_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert tensors_in(tmp_path / "out").keys() == tensors_in(tmp_path / "base").keys()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "float16"),
    ],
)
def test_weights_have_the_dtype_that_is_asked_for(
    own: torch.dtype, dtype: Any, tmp_path: Path
) -> None:
    """By default that of the base; each adapted weight is the rounded sum, all others the base's.

    The difference that is returned is that of rounding, and none without.
    """
    trained = Result("llama", tmp_path / "base", own)
    wanted = own if dtype is None else getattr(torch, dtype)

    found = export_merged(trained.source, trained.learned, {}, tmp_path / "out", dtype=dtype)

    before, after = tensors_in(tmp_path / "base"), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        factors = trained.learned.get(name.removesuffix(".weight"))
        sum_ = before[name].float()
        if factors is not None:
            sum_ = sum_ + torch.from_numpy(factors.dense())
        assert tensor.dtype == wanted
        torch.testing.assert_close(tensor, sum_.to(wanted), rtol=2**-7, atol=1e-7)
    assert (found <= TOLERANCE) == (wanted == torch.float32)
    assert found < 0.05
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == wanted
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A number beyond its range does not become infinity; the line names weight and way out."""
    trained = Result("llama", tmp_path / "base")
    name = next(iter(trained.learned))
    shape = trained.learned[name].dense().shape
    huge = Factors(np.full((shape[0], 1), 1e5, np.float32), np.ones((1, shape[1]), np.float32))

    with pytest.raises(NumericError, match=rf"{name}.weight: .*--dtype bfloat16"):
        export_merged(trained.source, {name: huge}, {}, tmp_path / "out", dtype="float16")


def test_it_is_a_whole_model_folder(tmp_path: Path) -> None:
    """Tokenizer and chat template are those of the base, the config is the base's own."""
    base, out = save_model("llama", tmp_path / "base"), tmp_path / "out"
    trained = Result("llama", tmp_path / "other")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "use_cache": True}))
    source = ModelSource(str(base), "causal-lm")

    export_merged(source, trained.learned, {}, out, trained.facts)

    for path in base.iterdir():
        if "token" in path.name or "chat" in path.name:
            assert (out / path.name).read_bytes() == path.read_bytes()
    written = AutoConfig.from_pretrained(out)
    assert written.use_cache
    assert written.architectures == ["LlamaForCausalLM"]
    assert (out / "generation_config.json").is_file()
    assert "FROM ." in (out / "Modelfile").read_text().splitlines()


def test_a_classifier_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    """Neither LABEL_0 nor a missing pad token."""
    trained = Result("bert", tmp_path / "base")

    export_merged(trained.source, trained.learned, trained.head, tmp_path / "out", trained.facts)

    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: n for n, name in enumerate(NAMES)}
    assert config.pad_token_id == 1
    assert config.architectures == ["BertForSequenceClassification"]
    assert not (tmp_path / "out" / "Modelfile").exists()


def test_only_tensors_of_the_model_are_written(tmp_path: Path) -> None:
    """A head that is tied stands there once, be it twice in the base; strangers stay behind."""
    trained = Result("llama", tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    more = {"lm_head.weight": state["model.embed_tokens.weight"].clone(), "stranger": torch.ones(2)}
    save_file({**state, **more}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(str(tmp_path / "base"), "causal-lm")

    export_merged(source, trained.learned, {}, tmp_path / "out")

    assert tensors_in(tmp_path / "out").keys() == state.keys()


def test_the_part_that_sees_pictures_is_kept(tmp_path: Path) -> None:
    """A run on text never calls it; it stands in the merged model as it does in the base."""
    text = make_config("gemma3_text", num_hidden_layers=2).to_dict()
    seeing = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    seeing |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=seeing, mm_tokens_per_image=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    source = ModelSource(str(tmp_path / "base"), "causal-lm")

    export_merged(source, {}, {}, tmp_path / "out")

    before, after = tensors_in(tmp_path / "base"), tensors_in(tmp_path / "out")
    assert [name for name in before if "vision" in name]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is not on disk as it was computed does not pass as an export."""
    trained = Result("llama", tmp_path / "base")
    write = merged._Shards._flush

    def damaged(shards: Any) -> None:
        name = "model.layers.3.mlp.up_proj.weight"
        if name in shards._filling:
            shards._filling[name] = shards._filling[name] * 1.001
        write(shards)

    monkeypatch.setattr(merged._Shards, "_flush", damaged)

    with pytest.raises(ExportError, match="layers.3.mlp.up_proj.weight is not what was written"):
        export_merged(trained.source, trained.learned, {}, tmp_path / "out")
