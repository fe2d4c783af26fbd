"""transformers runs no code that comes with a model, wherever we call it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import ModelError
from edge_sdk.model.weights import FILE_NAMES, load_config, load_tokenizer, without_leads
from tests.e2e.cluster import save_model

ROOT = Path(__file__).parents[1]
CALLS = {
    "from_pretrained": {"trust_remote_code": False, "local_files_only": True},
    "from_config": {"trust_remote_code": False},
}
# Calls that know no such argument, each with what it loads.
OTHERS = {
    ("coordinator/export/check.py", "PeftModel.from_pretrained"): "tensors and a config of PEFT",
    ("edge_sdk/model/checkpoint.py", "AutoHfQuantizer.from_config"): "a class of transformers",
}


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every call of ours that has transformers read or build something, with its arguments."""
    for package in ("edge_sdk", "coordinator", "profiler"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if node.func.attr in CALLS:
                    given = {k.arg: k.value for k in node.keywords if k.arg}
                    said = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
                    yield str(path.relative_to(ROOT)), ast.unparse(node.func), said


def test_every_call_forbids_code_and_the_network() -> None:
    """No call leaves it to a default, which would ask the operator on the device's terminal."""
    found = list(calls())

    assert len(found) >= 10
    for path, name, given in found:
        if (path, name) not in OTHERS:
            assert CALLS[name.rpartition(".")[2]].items() <= given.items(), (path, name)
    assert {(path, name) for path, name, _ in found} >= OTHERS.keys()


LEADS = {
    "auto_map": {"AutoConfig": "evil/repo--x.Evil"},
    "custom_pipelines": {"x": "y"},
    "trust_remote_code": True,
    "_name_or_path": "/etc",
    "name_or_path": "../secret",
    "vocab_file": "/etc/passwd",
    "tokenizer_file": "device.key",
    "merges_file": "train.jsonl",
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "use_kernels": True,
    "kernel_config": {"x": "evil/kernel"},
}


def test_what_leads_elsewhere_is_left_out() -> None:
    """Keys that name files, repositories or kernels are taken out at any depth; others stay."""
    kept: dict[str, Any] = {
        "model_type": "llama",
        "kernel_size": 4,
        "text_config": {"hidden_size": 8},
        "tokens": [{"content": "x"}],
    }
    sent = {**kept, **LEADS, "text_config": {**LEADS, "hidden_size": 8}}

    assert json.loads(without_leads("config.json", json.dumps(sent).encode())) == kept
    assert json.loads(without_leads("tokenizer_config.json", json.dumps(sent).encode())) == kept
    plain = json.dumps(kept).encode()
    assert without_leads("config.json", plain) is plain
    with pytest.raises(ModelError, match="config.json is no JSON"):
        without_leads("config.json", b"{")


def test_a_model_that_asks_for_code_is_read_without(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of that in its files, config and tokenizer are read; nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    folder = save_model("llama", tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **LEADS}))
    sent = tmp_path / "sent"
    sent.mkdir()
    for name in FILE_NAMES:
        if (folder / name).is_file():
            (sent / name).write_bytes(without_leads(name, (folder / name).read_bytes()))

    assert load_config(sent, 0).model_type == "llama"
    assert len(load_tokenizer(sent)("ab")["input_ids"])
    assert load_config(folder, 0).model_type == "llama"
    assert "run the custom code" not in capfd.readouterr().out


def test_a_family_that_only_its_own_code_knows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers does not know the model itself, the error is one line, and no question."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil/repo--x.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config.json cannot be read: "):
        load_config(tmp_path, 0)
