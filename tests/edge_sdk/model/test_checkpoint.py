"""What is read tensor by tensor is what transformers reads as a whole, whatever lies on disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from edge_sdk.errors import ModelError
from edge_sdk.model.checkpoint import ModelTensors
from edge_sdk.model.layout import build_empty
from edge_sdk.model.weights import ModelSource
from tests.edge_sdk.model.test_weights import fake_hub
from tests.memory_group import memory_group

_SIZE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_MOE = {
    **_SIZE,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = {
    **_MOE,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "gpt_oss": _MOE,
    "deepseek_v3": _DEEPSEEK,
    "phimoe": _MOE,
    "granitemoe": _MOE,
    "gemma3": {"text_config": _SIZE, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "gpt2": {**_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "llama": _SIZE,
    "bert": {**_SIZE, "is_decoder": True},
}


@cache
def made(family: str) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))


def saved(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write the model as transformers does; returns what then lies in its file."""
    made(family).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def written(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Replace the file with the weights."""
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def changed(folder: Path, **changes: Any) -> None:
    """Change entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor of the model is, to the bit, what `from_pretrained` makes of the folder."""
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    config = AutoConfig.from_pretrained(folder)
    model: Any = build_empty(config, "causal-lm", dtype)
    found = ModelTensors(model, load_file(folder / "model.safetensors"), folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_what_transformers_saves(family: str, tmp_path: Path) -> None:
    """Experts in files of their own, fused ones, other prefixes: the same tensors to the bit."""
    saved(family, tmp_path)

    assert_same(tmp_path)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_it_reads_half_precision_as_transformers_does(family: str, tmp_path: Path) -> None:
    """In bfloat16, but for what the model computes in float32 in any case."""
    tensors = saved(family, tmp_path)
    written({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path)
    changed(tmp_path, dtype="bfloat16")

    assert_same(tmp_path, torch.bfloat16)


def old_bert(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of norms as TensorFlow had them."""
    for name, tensor in tensors.items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        yield old.replace("LayerNorm.bias", "LayerNorm.beta"), tensor


def without_prefix(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of a model without a head, as `AutoModel` saves it."""
    for name, tensor in tensors.items():
        yield name.removeprefix("transformer.").removeprefix("model."), tensor


def more(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that this model does not have."""
    yield from tensors.items()
    yield "model.layers.9.mtp.weight", torch.ones(3)
    yield "model.rotary_emb.inv_freq", torch.ones(3)


Rewrite = Callable[[Mapping[str, torch.Tensor]], Iterator[tuple[str, torch.Tensor]]]
REWRITTEN: list[tuple[str, Rewrite]] = [
    ("bert", old_bert),
    ("gpt2", without_prefix),
    ("llama", without_prefix),
    ("llama", more),
    ("mixtral", more),
]


@pytest.mark.parametrize(("family", "rewrite"), REWRITTEN)
def test_it_reads_older_names(family: str, rewrite: Rewrite, tmp_path: Path) -> None:
    """Other spellings and surplus tensors are taken as transformers takes them."""
    tensors = dict(rewrite(saved(family, tmp_path)))
    written(tensors, tmp_path)

    assert_same(tmp_path)


# ---- weights in 8 and 4 bits ----


def in_mxfp4(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts as gpt-oss has them: 32 numbers of 4 bits share a power of two."""
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32, 16)
            yield f"{name}_blocks", torch.randint(0, 256, blocks, dtype=torch.uint8)
            yield f"{name}_scales", torch.randint(120, 130, blocks[:3], dtype=torch.uint8)
        else:
            yield name, tensor.bfloat16()


def in_fp8(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Linear layers as DeepSeek and Qwen have them: a scale for each tile."""
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            yield name, tensor.to(torch.float8_e4m3fn)
            yield f"{name}_scale_inv", torch.rand(1, 1) + 0.5
        else:
            yield name, tensor.bfloat16()


QUANTISED: list[tuple[str, Rewrite, dict[str, Any]]] = [
    ("gpt_oss", in_mxfp4, {"quant_method": "mxfp4"}),
    ("qwen3_moe", in_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ("llama", in_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
]


@pytest.mark.parametrize(("family", "rewrite", "said"), QUANTISED)
def test_weights_in_few_bits_are_made_dense(
    family: str, rewrite: Rewrite, said: dict[str, Any], tmp_path: Path
) -> None:
    """As transformers makes them where it has no kernel for them; devices hear nothing of it."""
    torch.manual_seed(1)
    written(dict(rewrite(saved(family, tmp_path))), tmp_path)
    changed(tmp_path, dtype="bfloat16", quantization_config=said)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()

    source = ModelSource(str(tmp_path), "causal-lm")

    for part in source.layout.part_names():
        for name, tensor in source.tensors(part).items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, expected[name]), name
    assert b"quantization_config" not in source.pack("files")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "nobody-knows"])
def test_weights_that_stay_quantised_are_refused(method: str, tmp_path: Path) -> None:
    """One line that names how they are quantised and what to take instead, exit code 8."""
    saved("llama", tmp_path)
    changed(tmp_path, quantization_config={"quant_method": method, "bits": 4})

    with pytest.raises(ModelError, match=f"quantised by {method}.* take the model that") as caught:
        ModelSource(str(tmp_path), "causal-lm")

    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 8


# ---- ties, and what is missing ----


def test_a_tied_head_that_differs_is_its_own(tmp_path: Path) -> None:
    """Where config and file contradict each other the file is right, as for transformers."""
    written({**saved("llama", tmp_path), "lm_head.weight": torch.randn(40, 32)}, tmp_path)
    changed(tmp_path, tie_word_embeddings=True)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()

    source = ModelSource(str(tmp_path), "causal-lm")

    assert not source.layout.tail_needs_front
    assert torch.equal(source.tensors("tail")["lm_head.weight"], expected["lm_head.weight"])
    assert torch.equal(
        source.tensors("front")["model.embed_tokens.weight"], expected["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_tensor_may_lie_under_either_name(kept: str, tmp_path: Path) -> None:
    """One of the two names, or both with equal values, is one tensor."""
    tensors = saved("llama", tmp_path)
    both = {name: torch.ones(40, 32) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    own = both if kept == "both" else {kept: both[kept]}
    written({**{n: t for n, t in tensors.items() if n not in both}, **own}, tmp_path)
    changed(tmp_path, tie_word_embeddings=True)

    source = ModelSource(str(tmp_path), "causal-lm")

    assert source.layout.tail_needs_front
    assert torch.equal(source.tensors("front")["model.embed_tokens.weight"], torch.ones(40, 32))


LOST: list[tuple[str, str, str]] = [
    ("llama", "model.layers.1.mlp.up_proj.weight", "1 of the model's weights"),
    ("llama", "model.embed_tokens.weight", "1 of the model's weights"),
    ("mixtral", "experts.3.w2.weight", r"down_proj: shape \(3, "),
    ("mixtral", "experts.3.w1.weight", "gate_up_proj cannot be made"),
]


@pytest.mark.parametrize(("family", "lost", "message"), LOST)
def test_weights_that_are_missing_are_one_line(
    family: str, lost: str, message: str, tmp_path: Path
) -> None:
    """No block is drawn at random, as nobody would notice: a model error that names it."""
    tensors = saved(family, tmp_path)
    written({n: t for n, t in tensors.items() if not n.endswith(lost)}, tmp_path)
    source = ModelSource(str(tmp_path), "causal-lm")

    def read() -> None:
        source.load_whole(0)
        for part in source.part_names():
            source.describe(part)

    with pytest.raises(ModelError, match=message) as caught:
        read()

    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# ---- files of torch.save ----


def in_torch_files(folder: Path, shards: int = 0, **how: Any) -> None:
    """Turn a folder's safetensors file into one file of `torch.save`, or several with an index."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    if not shards:
        torch.save(tensors, folder / "pytorch_model.bin", **how)
        return
    weight_map = {}
    for shard in range(shards):
        own = dict(list(tensors.items())[shard::shards])
        name = f"pytorch_model-{shard}.bin"
        torch.save(own, folder / name, **how)
        weight_map |= dict.fromkeys(own, name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


FORMS: dict[str, dict[str, Any]] = {
    "one file": {},
    "several files": {"shards": 3},
    "before torch 1.6": {"_use_new_zipfile_serialization": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_files_of_torch_are_the_same_model(family: str, form: str, tmp_path: Path) -> None:
    """A folder with pytorch_model.bin describes every part by the hash of its safetensors twin."""
    saved(family, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    in_torch_files(tmp_path / "old", **FORMS[form])

    new, old = (ModelSource(str(tmp_path / name), "causal-lm") for name in ("new", "old"))

    for part in new.part_names():
        assert old.describe(part) == new.describe(part)


def test_a_hub_id_with_files_of_torch_only_is_read(tmp_path: Path) -> None:
    """Its cached snapshot is found offline, and remembered with its commit."""
    saved("llama", tmp_path / "own")
    in_torch_files(tmp_path / "own")
    fake_hub(tmp_path / "own", tmp_path)
    code = (
        "from edge_sdk.model.weights import ModelSource\n"
        "source = ModelSource('someone/tiny', 'causal-lm')\n"
        "print(source.hub_id, source.revision[:4], source.describe('block.1').sha256)"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )

    expected = ModelSource(str(tmp_path / "own"), "causal-lm").describe("block.1").sha256
    assert done.stdout.split() == ["someone/tiny", "0123", expected]


class Evil:
    """What a file could hold that runs when it is opened."""

    def __reduce__(self) -> Any:
        """Say what to run."""
        return os.mkdir, ("evil",)


def zipped(content: Any, path: Path) -> bytes:
    """What `torch.save` writes."""
    torch.save(content, path)
    return path.read_bytes()


FOREIGN: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "noise": lambda _: bytes(range(256)) * 8,
    "cut": lambda path: zipped({"a": torch.ones(4096)}, path)[:9000],
    "a list": lambda path: zipped([torch.ones(2)], path),
    "a pickle": lambda _: pickle.dumps({"a": 1}),
    "a program": lambda path: zipped({"a": Evil()}, path),
    "a bare program": lambda _: pickle.dumps(Evil()),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_of_torch_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, exit code 8; nothing in it is run."""
    monkeypatch.chdir(tmp_path)
    saved("llama", tmp_path / "own")
    (tmp_path / "own" / "model.safetensors").unlink()
    path = tmp_path / "own" / "pytorch_model.bin"
    path.write_bytes(FOREIGN[name](tmp_path / "made.bin"))

    with pytest.raises(ModelError) as caught:
        ModelSource(str(tmp_path / "own"), "causal-lm").load_whole(0)

    assert str(tmp_path / "own") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 8
    assert not (tmp_path / "evil").exists()


# ---- parts ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_written_as_safetensors_would(dtype: torch.dtype, tmp_path: Path) -> None:
    """A tensor at a time gives the bytes of a whole dictionary, so that hashes stay what they were.

    With dtypes mixed, scalars, empty tensors and views.
    """
    tensors = {n: t.to(dtype) for n, t in saved("mixtral", tmp_path).items()}
    tensors |= {"b": torch.ones(3, 4, dtype=torch.int64).T, "a.scalar": torch.tensor(1.5)}
    tensors |= {"none": torch.empty(0, 7), "a": torch.arange(6, dtype=torch.uint8)[::2]}
    source = ModelSource(str(tmp_path), "causal-lm")
    source.tensors = lambda _: tensors  # type: ignore[method-assign]

    assert source.pack("block.0") == save({n: t.contiguous() for n, t in tensors.items()})


READING = """
import resource
from edge_sdk.model.weights import ModelSource
source = ModelSource({folder!r}, "causal-lm")
source.load_whole(0)
for part in source.part_names():
    source.describe(part)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def reading(folder: Path) -> list[str]:
    """The command that reads every part of a model, and prints the memory that it took."""
    return [sys.executable, "-c", READING.format(folder=str(folder))]


def test_a_model_is_read_in_little_memory(tmp_path: Path) -> None:
    """One whose experts lie apart on disk, in 0.6 of its size more than a tiny one takes."""
    saved("mixtral", tmp_path / "tiny")
    sizes = {**_MOE, "hidden_size": 512, "intermediate_size": 1024}
    sizes |= {"num_hidden_layers": 8, "num_local_experts": 8}
    model = build_empty(AutoConfig.for_model("mixtral", **sizes), "causal-lm", torch.bfloat16)
    real: Any = model.to_empty(device="cpu")
    real.save_pretrained(tmp_path / "large")
    size = sum(p.numel() * p.element_size() for p in real.parameters())
    del model, real
    least = int(subprocess.check_output(reading(tmp_path / "tiny")))

    with memory_group() as group:
        group.limit(least + int(0.6 * size))
        command = group.command(reading(tmp_path / "large"))
        done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-500:]
