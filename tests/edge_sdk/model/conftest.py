"""What several tests of models read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_config, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied llama as transformers saves it."""
    path = tmp_path_factory.mktemp("models") / "llama"
    model: Any = make_model(make_config("llama"), "causal-lm")
    model.save_pretrained(path)
    return path
