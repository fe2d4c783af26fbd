"""What an export needs beside us is looked for, and what is missing is said in one line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from coordinator.export import needs
from coordinator.export.needs import CONVERTER, find_converter
from edge_sdk.errors import ConfigError
from tests.coordinator.export import convert_lora_to_gguf

STAND_IN = Path(convert_lora_to_gguf.__file__)


def test_the_converter_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option, then in the environment, then on the search path; else one line says how."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ConfigError, match="clone llama.cpp .* --llama-cpp .* LLAMA_CPP") as error:
        find_converter(None)
    assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match=f"no {CONVERTER} at {tmp_path}"):
        find_converter(tmp_path)
    assert find_converter(STAND_IN.parent) == STAND_IN
    assert find_converter(STAND_IN) == STAND_IN
    monkeypatch.setenv("LLAMA_CPP", str(STAND_IN.parent))
    assert find_converter(None) == STAND_IN
    monkeypatch.delenv("LLAMA_CPP")
    shutil.copy(STAND_IN, tmp_path)
    (tmp_path / CONVERTER).chmod(0o755)
    assert find_converter(None) == tmp_path / CONVERTER


def test_without_the_gguf_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"pip install 'edgesplit\[gguf\]'"):
        find_converter(STAND_IN)
