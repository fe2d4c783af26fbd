"""A device takes the backend that it has, and loads nothing of the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.client.backends import BACKENDS, choose_backend
from edge_sdk.client.config import ClientConfig
from edge_sdk.errors import ConfigError

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "peft", "onnx", "onnxscript", "sympy", "scipy")


def config(**settings: Any) -> ClientConfig:
    """A device's config."""
    return ClientConfig(coordinator="tcp://127.0.0.1:1", server_key="x", **settings)


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let packages be not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_torch_comes_first_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is torch; without it, or without peft, onnxruntime."""
    assert choose_backend(config()).name == "torch"
    absent(monkeypatch, "peft")
    assert choose_backend(config()).name == "onnxruntime"


def test_neither_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both extras are named, and the small one is called so."""
    absent(monkeypatch, "torch", "onnxruntime")
    with pytest.raises(ConfigError, match=r"neither.*edgesplit\[onnx\]' \(small\).*\[torch\]"):
        choose_backend(config())
    with pytest.raises(ConfigError, match=r"backend: 'torch' needs torch, .*edgesplit\[torch\]"):
        choose_backend(config(backend="torch"))
    with pytest.raises(ConfigError, match=r"'onnxruntime' needs onnxruntime, .*edgesplit\[onnx\]"):
        choose_backend(config(backend="onnxruntime"))


@pytest.mark.parametrize("missing", [(), ("onnxruntime",), ("onnx", "tokenizers")])
def test_gradients_of_its_own_need_the_training_build(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    """Plain onnxruntime has the same name: one line says which package, and what it excludes."""
    absent(monkeypatch, *missing)

    needs = ", ".join(("onnxruntime.training", *(n for n in missing if n != "onnxruntime")))
    cure = r"pip install 'edgesplit\[onnx-training\]', which excludes onnxruntime"
    with pytest.raises(ConfigError, match=f"needs {needs}, not installed; {cure}"):
        choose_backend(config(backend="onnxruntime-training"))


def test_memory_is_planned_by_the_form_of_the_gradients() -> None:
    """Those that a device makes itself keep more of a block, and the planner is told."""
    told = [BACKENDS[name].memory_model(config()).recompute for name in list(BACKENDS)[1:]]

    assert told == ["block", "own-block"]


@pytest.mark.parametrize(
    ("name", "value"), [("device", "cuda"), ("compute", "bfloat16"), ("model", "gpt2")]
)
def test_what_onnxruntime_cannot_do_is_refused(name: str, value: str) -> None:
    """The field is named, and what to change."""
    with pytest.raises(ConfigError, match=f"{name}: '{value}' is not possible.*set backend"):
        choose_backend(config(backend="onnxruntime", **{name: value}))


def test_a_backend_that_is_none_is_refused() -> None:
    """Also where the config is written in Python: the choices are those of the table."""
    with pytest.raises(ValueError, match="one of auto, torch, onnxruntime, .*, got 'jax'"):
        config(backend="jax")


def test_the_runtime_loads_neither_torch_nor_transformers() -> None:
    """Everything that a device without torch runs can be imported without it."""
    modules = [
        "edge_sdk",
        "edge_sdk.client.participant",
        "edge_sdk.client.steps",
        "edge_sdk.runtime.onnx_runtime",
    ]
    code = (
        f"import json, sys, {', '.join(modules)}\n"
        f"print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert json.loads(output) == []
