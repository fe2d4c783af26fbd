"""Engines of one tiny model: in this process, and in actors on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coordinator.config.engine import EngineConfig
from coordinator.config.planning import PlanningConfig
from coordinator.config.run import ServeConfig
from coordinator.engine.interface import Engine, EngineSpec
from coordinator.engine.local import LocalEngine, make_local
from coordinator.engine.ray.engine import ray_engines
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.training import TrainingConfig
from tests.coordinator.engine.test_local import warm_pair
from tests.e2e.cluster import save_model
from tests.tiny import CLASSES, task_of

# Gradients are clipped, over all stages together. With so large an epsilon AdamW moves by what a
# gradient is, and not by the sign of one that is nothing but rounding.
TRAINING = TrainingConfig(learning_rate=1e-2, adam_epsilon=1e-3, max_grad_norm=0.05)


class Both(NamedTuple):
    """The same engine twice."""

    family: str
    config: ServeConfig
    spec: EngineSpec
    local: LocalEngine
    other: Engine
    pairs: dict[str, Pair]

    def restart(self) -> None:
        """Let both be as they were at first."""
        fresh = make_local(self.spec)
        fresh.begin(self.pairs)
        self.local.load_state(fresh.state())
        self.other.load_state(fresh.state())


def make_spec(folder: Path, family: str, engine: EngineConfig, **settings: Any) -> EngineSpec:
    """Return what an engine of a tiny model is made of; the first block is a device's."""
    model, task = folder / family, task_of(family)
    if not model.exists():
        save_model(family, model)
    names = tuple(f"class {i}" for i in range(CLASSES)) if task != "causal-lm" else ()
    config = ServeConfig(
        **{
            "model": str(model),
            "task": task,
            "label_names": names,
            "labels": "server",
            "lora": LoraConfig(r=4, lora_alpha=8),
            "training": TRAINING,
            "engine": engine,
            "device": "cpu",
            **settings,
        }
    )
    source = ModelSource(config.model, task, num_labels=len(names))
    source.load_whole(config.training.seed)
    layout = source.layout
    targets = find_targets(source.config, task, layout, config.lora)
    ranks = {name: 4 for name in targets if (layout.block_of(name) or 0) >= 1}
    return EngineSpec(config, source, tuple(layout.part_names()), 1, ranks)


@contextmanager
def both(folder: Path, family: str, shape: tuple[int, int], **settings: Any) -> Iterator[Both]:
    """Have an engine in this process, and one of *shape* (replicas, stages) in actors."""
    planning = PlanningConfig(ranks="rngwp", importance="signed", importance_every=1)
    settings = {"planning": planning, **settings}
    replicas, stages = shape
    config = EngineConfig(
        kind="ray",
        replicas=replicas,
        stages=stages,
        cpus_per_actor=settings.pop("cpus_per_actor", 0.1),
        address=settings.pop("address", None),
    )
    spec = make_spec(folder, family, config, **settings)
    targets = find_targets(spec.source.config, spec.config.task, spec.source.layout, LoraConfig())
    pairs = {name: warm_pair(name, targets[name]) for name in spec.ranks}
    with ray_engines(spec.config) as make:
        local, other = make_local(spec), make(spec)
        local.begin(pairs)
        other.begin(pairs)
        yield Both(family, spec.config, spec, local, other, pairs)


def assert_equal_states(found: Engine, expected: Engine, bound: float = 1e-6) -> None:
    """Compare everything that a restart needs."""
    # Without residuals of no rank, which only say that there was one.
    states = [{n: v for n, v in e.state().items() if v.size} for e in (found, expected)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        np.testing.assert_allclose(states[0][name], value, rtol=bound, atol=bound, err_msg=name)
