"""Turn settings into plans: which blocks, ranks and batches each device gets.

Pure: model facts and config in, `Plan` out; whatever cannot work is refused here, before a run
starts. It knows no socket, clock, file or tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.aggregation.rules import RULES
from coordinator.config.run import ServeConfig
from coordinator.planning.cuts import allowed_cuts, given_split
from coordinator.planning.plan_set import MOST_NAMED
from coordinator.planning.ranks import possible_ranks
from edge_sdk.errors import ConfigError, ModelError
from edge_sdk.lora.targets import ModelFacts, check_rank
from edge_sdk.protocol.plan import MOST_IN_FLIGHT, Plan


def plan_device(config: ServeConfig, facts: ModelFacts, device: str) -> Plan:
    """Return the plan that the config asks for, whatever `planning` may choose instead.

    Raises:
        ConfigError: split, rank or micro-batch cannot be had.
    """
    settings, own = config.settings(device), config.devices.get(device)
    split, rank = settings.split, settings.r
    assert split is not None
    assert rank is not None
    is_own = own is not None and own.split is not None
    split = given_split(config.planning, facts.layout, split, is_own=is_own)
    ranks = {name: config.lora.rank_of(name, rank) for name in facts.weights(0, split)}
    return make_plan(config, facts, device, split, ranks)


def make_plan(
    config: ServeConfig, facts: ModelFacts, device: str, split: int, ranks: Mapping[str, int]
) -> Plan:
    """Return the plan of a device for a split and ranks that somebody has chosen.

    Raises:
        ConfigError: split, rank or micro-batch cannot be had.
        ModelError: the model cannot be cut there.
    """
    where = f"devices.{device}" if device in config.devices else "default"
    settings, num_blocks = config.settings(device), facts.layout.num_blocks
    batch = settings.batch_size
    assert batch is not None
    if not 1 <= split <= num_blocks:
        raise ConfigError(f"{where}.split: {split} is outside 1..{num_blocks} (the model's blocks)")
    if split not in facts.layout.cuts:
        raise ModelError(f"{where}.split: {split}: {facts.layout.why_not(split)}")
    if split < (least := allowed_cuts(config.planning, facts.layout)[0]):
        raise ConfigError(
            f"{where}.split: {split} is below planning.min_split {config.planning.min_split}; "
            f"give it {least} or more, or lower planning.min_split"
        )
    micro = settings.micro_batch or batch
    if batch < 1 or micro < 1 or batch % micro:
        raise ConfigError(f"{where}.micro_batch: {micro} does not divide batch_size {batch}")
    assert settings.in_flight is not None
    if not 1 <= settings.in_flight <= MOST_IN_FLIGHT:
        raise ConfigError(f"{where}.in_flight: {settings.in_flight} is outside 1..{MOST_IN_FLIGHT}")
    _check_ranks(config, facts, ranks, f"{where}.r")
    if (settings.residual_rank or 0) < 0:
        raise ConfigError(f"{where}.residual_rank: {settings.residual_rank} is below 0")
    if split == num_blocks and not any(ranks.values()):
        raise ConfigError(
            f"{where}.r: 0 on all {num_blocks} blocks trains nothing; give it a rank, or a split "
            "that leaves the coordinator some"
        )
    return Plan(
        split=split,
        ranks={name: ranks[name] for name in facts.targets if name in ranks},
        alphas={name: config.lora.alpha_of(name) for name in facts.targets if name in ranks},
        batch_size=batch,
        micro_batch=micro,
        in_flight=min(settings.in_flight, batch // micro),
        tail=config.labels == "device" or split == num_blocks,
        residual=settings.residual or config.residual,
        residual_rank=settings.residual_rank or 0,
    )


def plan_server(config: ServeConfig, facts: ModelFacts, first: int) -> dict[str, int]:
    """Return the ranks of the coordinator's own adapters, in blocks first .. L-1."""
    rank = config.lora.r if config.server_rank is None else config.server_rank
    names = facts.weights(first, facts.layout.num_blocks)
    ranks = {name: config.lora.rank_of(name, rank) for name in names}
    _check_ranks(config, facts, ranks, "lora.r" if config.server_rank is None else "server_rank")
    return ranks


def _check_ranks(
    config: ServeConfig, facts: ModelFacts, ranks: Mapping[str, int], key: str
) -> None:
    """Refuse ranks that weights cannot have; *key* names the setting where no pattern does."""
    for name, rank in ranks.items():
        is_given = config.lora.rank_of(name, -1) >= 0
        check_rank(name, rank, facts.targets[name], "lora.rank_pattern" if is_given else key)


def check_config(config: ServeConfig, facts: ModelFacts) -> int:
    """Refuse a config that some device could not run; returns the shallowest split.

    Raises:
        ConfigError: it cannot be carried out; the message says what to change.
        ModelError: the model cannot be cut as it asks.
    """
    plans = {name: plan_device(config, facts, name) for name in config.devices}
    plans["default"] = plan_device(config, facts, "")
    first = min(plan.split for plan in plans.values())
    if config.planning.split != "fixed":
        first = allowed_cuts(config.planning, facts.layout)[0]  # any device that joins may get it
    if facts.layout.needs_ids and config.labels == "device" and first < facts.layout.num_blocks:
        raise ModelError(
            f"labels: 'device': blocks after the first need the token ids of the texts, which may "
            f"leave a device only with labels: server; or leave all {facts.layout.num_blocks} "
            "blocks to every device, with split: all"
        )
    check_planning(config, facts)
    ranks: dict[str, set[int]] = {}
    for held in (*(plan.ranks for plan in plans.values()), plan_server(config, facts, first)):
        for name, rank in held.items():
            ranks.setdefault(name, set()).add(rank)
    unequal = {name: sorted(found) for name, found in ranks.items() if len(found) > 1}
    rule, is_fixed = RULES[config.aggregation], config.planning.ranks == "fixed"
    if rule.needs_equal_ranks and unequal and is_fixed:
        name, found = next(iter(unequal.items()))
        raise ConfigError(
            f"aggregation: {config.aggregation!r} needs equal ranks, the config gives {found} for "
            f"{name!r}; use 'fedex' or one rank"
        )
    if config.training.rank_penalty and not rule.can_prune:
        pruning = " or ".join(repr(name) for name, other in RULES.items() if other.can_prune)
        raise ConfigError(
            f"training.rank_penalty: ranks are pruned under aggregation {pruning}, not "
            f"{config.aggregation!r}; set it to 0"
        )
    if rule.needs_whole_model and first < facts.layout.num_blocks:
        raise ConfigError(
            f"aggregation: {config.aggregation!r} does not weigh adapters by samples, so every "
            f"device must hold all {facts.layout.num_blocks} blocks, the config gives one {first}; "
            "use split: all, or 'fedex'"
        )
    return first


def check_planning(config: ServeConfig, facts: ModelFacts) -> None:
    """Refuse a `planning` section whose plans the aggregation could not join.

    Raises:
        ConfigError: it says what to change.
    """
    planning, rule = config.planning, RULES[config.aggregation]
    if planning.ranks != "fixed":
        possible_ranks(planning.rank_set, facts.targets)
    if rule.needs_whole_model and planning.split != "fixed":
        raise ConfigError(
            f"planning.split: {planning.split!r} chooses unequal splits, and aggregation "
            f"{config.aggregation!r} needs every device to hold all blocks; use "
            "planning.split: fixed with split: all"
        )
    if not rule.needs_equal_ranks:
        return
    if planning.ranks == "rngwp":
        raise ConfigError(
            f"planning.ranks: 'rngwp' gives devices unequal ranks, which aggregation "
            f"{config.aggregation!r} cannot join; use 'fedex', or planning.ranks: uniform"
        )
    own = {f"devices.{name}.r": settings.r for name, settings in config.devices.items()}
    own["server_rank"] = config.server_rank
    given = [key for key, rank in own.items() if rank is not None]
    if given and planning.ranks == "uniform":
        raise ConfigError(
            f"{given[0]}: aggregation {config.aggregation!r} needs one rank for everybody, which "
            f"planning.ranks: uniform chooses; remove {given[0]}, or use planning.ranks: fixed"
        )
    if planning.split != "fixed" and len(rank_set := _fixed_ranks(config)) > 1:
        raise ConfigError(
            f"aggregation: {config.aggregation!r} needs equal ranks, the config gives "
            f"{sorted(rank_set)}, and planning.split decides who holds which block; use 'fedex' "
            "or one rank"
        )


def _fixed_ranks(config: ServeConfig) -> set[int]:
    """Return the ranks that the config gives to devices and coordinator, patterns aside."""
    if config.planning.ranks != "fixed":
        return set()
    ranks = {config.settings(name).r for name in ("", *config.devices)}
    ranks.add(config.lora.r if config.server_rank is None else config.server_rank)
    return {rank for rank in ranks if rank is not None}


def by_hand(config: ServeConfig) -> list[str]:
    """Return, in a line each, what the config fixes of what it leaves to the planner otherwise."""
    chosen = {"split": config.planning.split, "r": config.planning.ranks}
    found = []
    for key, how in chosen.items():
        own = {name: getattr(settings, key) for name, settings in config.devices.items()}
        named = [
            f"devices.{name}.{key}: {value}" for name, value in own.items() if value is not None
        ]
        if how == "fixed" or not named:
            continue
        what = "split" if key == "split" else "ranks"
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        stand = "stand" if len(named) > 1 else "stands"
        found.append(
            f"{', '.join(named[:MOST_NAMED])}{more} {stand} in the config: fixed by hand, "
            f"planning.{what}={how} chooses none there ({named[0].split(':')[0]}=null lets it)"
        )
    return found
