"""A coordinator that cannot hold its part says so before it listens, and says what would fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.engine.room import require_room
from coordinator.engine.server_model import ServerModel
from edge_sdk.errors import ConfigError, DeviceError
from edge_sdk.model.kept.part_cache import PartCache
from tests.e2e.cluster import save_model

MIB = 2**20
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
"""Blocks of 4 MiB in float32: large beside what every process takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights count."""
    return save_model("llama", tmp_path_factory.mktemp("wide"), **WIDE)


def model_of(folder: Path, memory: float, **settings: Any) -> ServerModel:
    """The model of a run that may use so much memory."""
    config = ServeConfig(
        model=str(folder),
        labels="server",
        device="cpu",
        max_length=16,
        default=DeviceSettings(split=1, batch_size=2, codec="float32"),
        planning=PlanningConfig(server_memory_bytes=memory),
        **{"compute": "float32", **settings},
    )
    return ServerModel(config, PartCache(folder / "parts"))


def refused(model: ServerModel) -> str:
    """What stands in the way."""
    with pytest.raises(DeviceError) as caught:
        require_room(model)
    return str(caught.value)


def told(said: str, words: str) -> float:
    """The bytes behind *words*."""
    found = re.search(rf"{words} ([0-9.]+) (MiB|GiB)", said)
    assert found, said
    return float(found[1]) * {"MiB": MIB, "GiB": 2**30}[found[2]]


def test_what_would_fit_fits(folder: Path) -> None:
    """The base that is named runs in that memory, at what the line says; one byte less is less."""
    said = refused(model_of(folder, 1 * MIB))
    needs, least = told(said, "base: float32 needs"), told(said, "int4 needs")
    assert "no base would fit" in said
    assert "1 MiB are free" in said
    assert least < needs - 8 * MIB

    require_room(model_of(folder, needs + MIB))
    said = refused(model_of(folder, needs - 4 * MIB))
    assert "base: int8 would fit" in said  # bfloat16 does not multiply with float32
    int8 = told(said, "base: int8 would fit:")
    require_room(model_of(folder, int8 + MIB, base="int8"))
    assert "base: int4 would fit" in refused(model_of(folder, int8 - MIB, base="int8"))


def test_sixteen_bits_come_first_where_products_have_them(folder: Path) -> None:
    """Of the bases that fit the one with the largest weights is named."""
    wide = {"compute": "bfloat16"}
    needs = told(refused(model_of(folder, 1 * MIB, **wide)), "base: float32 needs")

    said = refused(model_of(folder, needs - 4 * MIB, **wide))

    assert "base: bfloat16 would fit" in said
    fits = told(said, "base: bfloat16 would fit:")
    require_room(model_of(folder, fits + MIB, base="bfloat16", **wide))


def test_who_evaluates_needs_the_whole_model(folder: Path) -> None:
    """With prompts, or a file, all blocks and the embeddings count."""
    own = told(refused(model_of(folder, 1.0)), "base: float32 needs")
    prompts = EvaluationConfig(prompts=("a",))

    said = refused(model_of(folder, 1.0, evaluation=prompts))

    assert "the whole model" in said
    assert told(said, "base: float32 needs") >= own + 3 * MIB  # told in whole MiB


def test_weights_that_do_not_multiply_are_refused_first(folder: Path) -> None:
    """16 bits under float32 products: one line that names both keys."""
    with pytest.raises(ConfigError, match="base: bfloat16 .*compute"):
        model_of(folder, 1e12, base="bfloat16")
