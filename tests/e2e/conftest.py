"""Tiny models on disk, with a tokenizer of single characters; made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, save_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of five blocks."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of five blocks."""
    return save_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where parts of models are kept; shared, as by the devices of one machine."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def cluster(tmp_path: Path, llama: Path, parts: Path) -> Iterator[Cluster]:
    """Keys of a coordinator and of devices a, b and c, around the causal model."""
    made = Cluster(tmp_path, llama, parts)
    yield made
    made.close()
