"""Models are found, cut into parts of stable bytes, and refused in one line where unreadable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edge_sdk.errors import ModelError
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.weights import ModelSource, load_config, locate, model_hash, open_part
from tests.tiny import CLASSES, make_config, make_model, task_of


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def test_parts_are_the_same_bytes_every_time(folder: Path) -> None:
    """Two readers of one folder describe every part by the same hash, and so the model."""
    first, second = (ModelSource(str(folder), "causal-lm") for _ in range(2))

    described = [{n: s.describe(n) for n in s.part_names()} for s in (first, second)]

    assert described[0] == described[1]
    assert model_hash(described[0]) == model_hash(dict(reversed(described[1].items())))
    data = first.pack("block.1")
    assert described[0]["block.1"].num_bytes == len(data)


def test_a_part_holds_its_tensors(folder: Path, tmp_path: Path) -> None:
    """A part that went through the cache gives the tensors of the folder."""
    source, cache = ModelSource(str(folder), "causal-lm"), PartCache(tmp_path)
    part = source.describe("block.2")

    found = open_part(cache.store(part, source.pack("block.2")))

    expected = source.tensors("block.2")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_files_hold_no_code(own: Path) -> None:
    """Config and tokenizer travel; what could be executed does not."""
    (own / "modeling_x.py").write_text("")
    (own / "tokenizer.json").write_text("{}")
    source = ModelSource(str(own), "causal-lm")
    path = own / "part"
    path.write_bytes(source.pack("files"))

    assert set(open_part(path)) == {"config.json", "generation_config.json", "tokenizer.json"}


def test_a_sharded_checkpoint_is_the_same_model(folder: Path, own: Path) -> None:
    """Weights in several files with an index give the same parts."""
    whole = ModelSource(str(folder), "causal-lm")
    tensors = {n: t for p in whole.layout.part_names() for n, t in whole.tensors(p).items()}
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    (own / "model.safetensors").unlink()
    weight_map = {}
    for i, half in enumerate(halves):
        save_file(half, own / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(half, f"model-{i}.safetensors")
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    sharded = ModelSource(str(own), "causal-lm")

    assert sharded.describe("block.3") == whole.describe("block.3")


def test_a_missing_head_is_drawn_from_the_seed(tmp_path: Path) -> None:
    """A base model becomes a classifier with the same head on every load with that seed."""
    model: Any = make_model(make_config("bert"), task_of("bert"))
    model.bert.save_pretrained(tmp_path / "bert")

    hashes = []
    for seed in (1, 1, 2):
        source = ModelSource(str(tmp_path / "bert"), task_of("bert"), num_labels=CLASSES)
        with pytest.raises(ModelError, match="no tensor"):
            source.tensors("tail")
        source.load_whole(seed)
        hashes.append((source.describe("tail").sha256, source.describe("block.0").sha256))

    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[2][0]
    assert hashes[0][1] == hashes[2][1]


def test_a_classifier_gets_a_padding_token(own: Path) -> None:
    """Without one, batches of several sequences could not be pooled."""
    text = json.loads((own / "config.json").read_text())
    text.pop("pad_token_id")
    (own / "config.json").write_text(json.dumps(text))

    assert load_config(own, 3).pad_token_id == text["eos_token_id"]
    assert load_config(own, 0).pad_token_id is None


def fake_hub(folder: Path, home: Path) -> Path:
    """Put a model into a hub cache as huggingface_hub lays it out."""
    repo, commit = (
        home / "hub" / "models--someone--tiny",
        "0123456789abcdef0123456789abcdef01234567",
    )
    snapshot = repo / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return snapshot


def test_a_hub_id_comes_from_the_cache(folder: Path, tmp_path: Path) -> None:
    """With HF_HOME and HF_HUB_OFFLINE an id is its cached snapshot; nothing is dialled.

    A process of its own, because the hub client reads its settings once.
    """
    snapshot = fake_hub(folder, tmp_path)
    code = "from edge_sdk.model.weights import locate; print(locate('someone/tiny'))"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )

    assert Path(done.stdout.strip()) == snapshot
    assert ModelSource(done.stdout.strip(), "causal-lm").layout.num_blocks == 5


def test_a_source_remembers_where_others_find_it(folder: Path, tmp_path: Path) -> None:
    """A snapshot in a hub cache is an id and a commit, a folder of one's own is neither."""
    snapshot = fake_hub(folder, tmp_path)
    cached, own = ModelSource(str(snapshot), "causal-lm"), ModelSource(str(folder), "causal-lm")

    assert (cached.hub_id, cached.revision) == ("someone/tiny", snapshot.name)
    assert (own.hub_id, own.revision) == (None, None)


@pytest.mark.parametrize("model", ["nobody/absent", "./absent", "~/absent-model", "a b/c d/e"])
def test_a_missing_model_is_one_line(model: str) -> None:
    """Neither a folder nor an id in the cache: one line that names it, exit code 8."""
    with pytest.raises(ModelError) as caught:
        locate(model)

    assert model in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 8


SPOILT = {
    "config.json": [b"", b"{", b"{}", b'{"model_type": "nothing-like-it"}', b"\xff\xfe"],
    "model.safetensors": [b"", b"garbage", b"\xff" * 64],
}


@pytest.mark.parametrize(
    ("name", "data"), [(name, data) for name, values in SPOILT.items() for data in values]
)
def test_an_unreadable_model_is_one_line(own: Path, name: str, data: bytes) -> None:
    """A file of the model that cannot be read is a model error of one line."""
    (own / name).write_bytes(data)

    with pytest.raises(ModelError) as caught:
        ModelSource(str(own), "causal-lm").load_whole(0)

    assert "\n" not in str(caught.value)
    assert str(own) in str(caught.value)


@pytest.mark.parametrize(
    "index", [b"{", b"{}", b'{"weight_map": {"a": "absent.safetensors"}}', b"\xff"]
)
def test_an_unreadable_index_is_one_line(own: Path, index: bytes) -> None:
    """An index that is no index, or that names an absent file, is a model error."""
    (own / "model.safetensors.index.json").write_bytes(index)

    with pytest.raises(ModelError) as caught:
        ModelSource(str(own), "causal-lm")

    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_one_line(own: Path) -> None:
    """A config alone is no model."""
    (own / "model.safetensors").unlink()

    with pytest.raises(ModelError) as caught:
        ModelSource(str(own), "causal-lm").load_whole(0)

    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    """The missing file is named."""
    with pytest.raises(ModelError, match=r"has no config.json"):
        locate(str(tmp_path))


# ---- the cache of parts ----
