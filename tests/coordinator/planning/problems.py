"""Situations to plan for: a tiny model, two devices, a coordinator."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.costs import Load, adapters_bytes
from coordinator.planning.problem import PlanningProblem, ServerProfile
from edge_sdk.lora.targets import LoraConfig, ModelFacts, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.model.shape import model_shape
from profiler.estimate.sizes import ModelShape
from profiler.profile import DeviceProfile
from tests.tiny import make_config, task_of

# A board on a radio link and one with a cable, both slower than the coordinator.
SLOW = DeviceProfile(
    memory_bytes=1e9,
    overhead_bytes=0.0,
    flops_per_s=1e7,
    up_bytes_per_s=1e6,
    down_bytes_per_s=2e6,
    round_trip_s=0.05,
)
FAST = replace(SLOW, flops_per_s=4e7, up_bytes_per_s=1e7, down_bytes_per_s=1e7, round_trip_s=0.001)
SERVER_SPEED = ServerProfile(memory_bytes=1e9, flops_per_s=1e8)


@functools.cache
def model_of(family: str, **changes: Any) -> tuple[ModelFacts, ModelShape]:
    """Facts and shape of a tiny model."""
    config, task = make_config(family, **changes), task_of(family)
    layout = find_layout(config, task)
    facts = ModelFacts(layout, find_targets(config, task, layout, LoraConfig()))
    return facts, model_shape(config, task, layout)


def make_problem(
    model: tuple[ModelFacts, ModelShape], *, planning: dict[str, Any] | None = None, **changes: Any
) -> PlanningProblem:
    """Two devices, everything planned."""
    chosen = {"split": "armsc", "ranks": "rngwp", "rank_set": (1, 2, 4, 8), **(planning or {})}
    settings = {
        "planning": PlanningConfig(**chosen),
        "default": DeviceSettings(split=1, batch_size=4, micro_batch=2, codec="bfloat16"),
        "lora": LoraConfig(r=4),
        **changes.pop("config", {}),
    }
    facts, shape = model
    fields = {
        "profiles": {"a": SLOW, "b": FAST},
        "server": SERVER_SPEED,
        "length": 16,
        **changes,
    }
    return PlanningProblem(
        config=ServeConfig(model="m", **settings), facts=facts, model=shape, **fields
    )


def with_memory(problem: PlanningProblem, **budgets: float) -> PlanningProblem:
    """The same with other memory budgets, after the margin."""
    share = 1.0 - problem.config.planning.memory_margin
    profiles = {
        name: replace(profile, memory_bytes=budgets.get(name, 1e9) / share)
        for name, profile in problem.profiles.items()
    }
    return replace(problem, profiles=profiles)


def priced(problem: PlanningProblem, ranks: dict[str, int]) -> float:
    """What adapters of device `a` add to its memory."""
    return adapters_bytes(
        problem,
        ranks,
        dict.fromkeys(ranks, Load(problem.tokens("a"), problem.in_flight("a"))),
    )
