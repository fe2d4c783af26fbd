"""Graphs are made once, elsewhere; what cannot be made is refused with the reason."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.onnx_export.cache import GraphCache, check_experts, check_layout, check_lora
from edge_sdk.errors import RefusedError
from edge_sdk.lora.targets import LoraConfig, ModelFacts, Shape, find_targets
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.weights import ModelSource
from edge_sdk.protocol.plan import Part, Plan
from edge_sdk.runtime.onnx_graphs import read_graphs
from tests.e2e.cluster import save_model
from tests.tiny import layout_of

PLAN = Plan(split=1, ranks={}, alphas={}, batch_size=1, micro_batch=1)
PATIENCE_S = 120.0


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """A tiny model on disk."""
    return ModelSource(str(save_model("gpt2", tmp_path / "model")), "causal-lm")


def shop(source: ModelSource, folder: Path) -> GraphCache:
    """A shop that keeps its graphs in *folder*."""
    targets = find_targets(source.config, source.task, source.layout, LoraConfig())
    return GraphCache(source, ModelFacts(source.layout, targets), 0, PartCache(folder))


def wait(made: GraphCache) -> Part:
    """Ask until the graphs are there."""
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        part = made.find(PLAN, measures=False)
        if part is not None:
            return part
        time.sleep(0.05)
    raise AssertionError("no graphs")


def test_graphs_are_made_once(source: ModelSource, tmp_path: Path) -> None:
    """Ordered at the first question, there later, at once in the next run; again where damaged."""
    first, second = (shop(source, tmp_path / "parts") for _ in range(2))
    assert first.find(PLAN, measures=False) is None

    part = wait(first)

    assert second.find(PLAN, measures=False) == part
    graphs = read_graphs(PartCache(tmp_path / "parts").path(part))
    forms = {"block.0", "vjp.0", "folded.block.0", "folded.vjp.0"}
    assert graphs.models.keys() == {"front", "transposed", *forms}
    assert not list(tmp_path.glob("edgesplit-graphs-*"))
    (index,) = (tmp_path / "parts").glob("*.graphs.json")
    for damaged in (b"", bytes(40), b"[]", b'{"a": 1}', b"\xff"):
        index.write_bytes(damaged)
        third = shop(source, tmp_path / "parts")
        assert third.find(PLAN, measures=False) is None  # they are made again
        third.close()


def test_what_cannot_be_made_is_refused(source: ModelSource, tmp_path: Path) -> None:
    """The other process's last words travel, in one line, with what to do."""
    made = shop(source, tmp_path / "parts")
    (source.folder / "config.json").write_text("{")

    with pytest.raises(RefusedError, match=r"no graphs .*config.json.*; install torch there") as e:
        wait(made)
    assert "\n" not in str(e.value)


def test_a_shop_that_closes_leaves_nothing_behind(source: ModelSource, tmp_path: Path) -> None:
    """The other process ends with the run."""
    made = shop(source, tmp_path / "parts")
    made.find(PLAN, measures=False)
    (build,) = made._builds.values()

    made.close()

    assert build.process.poll() is not None
    assert not build.path.parent.exists()


def test_adapted_experts_are_refused_with_a_cure(source: ModelSource) -> None:
    """Only where a device would hold them; the setting and both ways out are named."""
    path = source.layout.blocks_path
    targets = {f"{path}.1.q_proj": Shape(4, 4), f"{path}.2.experts.down_proj": Shape(3, 4, 4)}
    facts = ModelFacts(source.layout, targets)

    check_experts(facts, 2)
    with pytest.raises(RefusedError, match=r"2.experts.down_proj.* set lora.experts to false, or"):
        check_experts(facts, 3)


def test_dropout_is_refused_with_a_cure() -> None:
    """The setting and both ways out are named."""
    check_lora(LoraConfig())
    with pytest.raises(RefusedError, match=r"lora_dropout: 0.2 .* set it to 0, or install torch"):
        check_lora(LoraConfig(lora_dropout=0.2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"late": ("front",)}, "a tensor of the embeddings' side"),
        ({"needs_ids": True}, "the token ids"),
        ({"shared": ((0, 1),)}, "what an earlier block has kept"),
    ],
)
def test_graphs_that_would_lack_an_input_are_not_made(changes: Any, reason: str) -> None:
    """A device without torch is told in one line what its blocks would need."""
    layout = layout_of("llama")
    check_layout(layout)

    with pytest.raises(RefusedError, match=reason):
        check_layout(replace(layout, **changes))
