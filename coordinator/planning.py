"""Turn settings into plans: which blocks, ranks and batches each device gets.

Pure: model facts and config in, `Plan` out; whatever cannot work is refused here, before a run
starts. Knows no socket, clock, file or tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.config import ServeConfig
from edge_sdk.adapters import Shape, check_rank
from edge_sdk.errors import ConfigError
from edge_sdk.layout import Layout
from edge_sdk.plan import Plan


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of the model."""

    layout: Layout
    targets: Mapping[str, Shape]
    """Adapted weights of all blocks, in model order."""

    def block_of(self, weight: str) -> int:
        """The block that a weight belongs to."""
        return int(weight.removeprefix(f"{self.layout.blocks_path}.").split(".", 1)[0])

    def weights(self, first: int, stop: int) -> list[str]:
        """Adapted weights of blocks first .. stop-1."""
        return [name for name in self.targets if first <= self.block_of(name) < stop]


def plan_device(config: ServeConfig, facts: ModelFacts, device: str) -> Plan:
    """Return the plan that the config asks for.

    Raises:
        ConfigError: split, rank or micro-batch cannot be had.
    """
    settings = config.settings(device)
    where = f"devices.{device}" if device in config.devices else "default"
    split, rank = settings.split, settings.r
    batch = settings.batch_size
    assert split is not None
    assert rank is not None
    assert batch is not None
    num_blocks = facts.layout.num_blocks
    if not 1 <= split <= num_blocks:
        raise ConfigError(f"{where}.split: {split} is outside 1..{num_blocks} (the model's blocks)")
    micro = settings.micro_batch or batch
    if batch < 1 or micro < 1 or batch % micro:
        raise ConfigError(f"{where}.micro_batch: {micro} does not divide batch_size {batch}")
    names = facts.weights(0, split)
    ranks = {name: config.lora.rank_of(name, rank) for name in names}
    for name in names:
        check_rank(name, ranks[name], facts.targets[name])
    return Plan(
        split=split,
        ranks=ranks,
        alphas={name: config.lora.alpha_of(name) for name in names},
        batch_size=batch,
        micro_batch=micro,
        tail=config.labels == "device" or split == num_blocks,
    )


def plan_server(config: ServeConfig, facts: ModelFacts, first: int) -> dict[str, int]:
    """Return the ranks of the coordinator's own adapters, in blocks first .. L-1."""
    rank = config.lora.r if config.server_rank is None else config.server_rank
    names = facts.weights(first, facts.layout.num_blocks)
    ranks = {name: config.lora.rank_of(name, rank) for name in names}
    for name in names:
        check_rank(name, ranks[name], facts.targets[name])
    return ranks


def check_config(config: ServeConfig, facts: ModelFacts) -> int:
    """Refuse a config that some device could not run; returns the shallowest split."""
    plans = {name: plan_device(config, facts, name) for name in config.devices}
    plans["default"] = plan_device(config, facts, "")
    first = min(plan.split for plan in plans.values())
    ranks: dict[str, set[int]] = {}
    for held in (*(plan.ranks for plan in plans.values()), plan_server(config, facts, first)):
        for name, rank in held.items():
            ranks.setdefault(name, set()).add(rank)
    unequal = {name: sorted(found) for name, found in ranks.items() if len(found) > 1}
    if config.aggregation == "fedavg" and unequal:
        name, found = next(iter(unequal.items()))
        raise ConfigError(
            f"aggregation: 'fedavg' needs equal ranks, the config gives {found} for {name!r}; "
            "use 'exact' or one rank"
        )
    return first
