"""What a device gets that could not do its plan: the next smaller one. Pure.

First smaller micro-batches, which change no result; then fewer blocks, one at a time; then ranks,
halved; then frozen blocks, so that it computes forward only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from coordinator.aggregation.rules import RULES
from coordinator.config.run import ServeConfig
from edge_sdk.lora.targets import ModelFacts
from edge_sdk.protocol.plan import Plan


def smaller_step(plan: Plan) -> Plan | None:
    """Return *plan* with less of a step under way at the same time; None where that is the least.

    The micro-batch falls to a divisor of the batch, to half of itself or less; then one micro-batch
    is under way after the other.
    """
    half = plan.micro_batch // 2
    micro = next((n for n in range(half, 0, -1) if plan.batch_size % n == 0), 0)
    if micro:
        return replace(plan, micro_batch=micro)
    return replace(plan, in_flight=1) if plan.in_flight > 1 else None


def smaller_steps(plan: Plan) -> Iterator[Plan]:
    """Yield *plan* with ever less of a step under way."""
    step = smaller_step(plan)
    while step is not None:
        yield step
        step = smaller_step(step)


def smaller(
    config: ServeConfig, facts: ModelFacts, plan: Plan, server_ranks: Mapping[str, int]
) -> Plan | None:
    """Return the next smaller plan of a device; None where the config leaves none.

    What leaves the device is not changed by this: where all blocks are a device's by config, they
    stay there, and it never runs fewer than `planning.min_split`.

    Args:
        config: The run; it says which splits and ranks are to stay.
        facts: Its model.
        plan: What was too much.
        server_ranks: Ranks that the coordinator would train weights with.
    """
    step = smaller_step(plan)
    if step is not None and plan.split == facts.layout.num_blocks:
        # One after the other is no less where no gradient comes from elsewhere, but below.
        plan, step = (plan, step) if step.micro_batch < plan.micro_batch else (step, None)
    return (
        step
        or _shallower(config, facts, plan, server_ranks)
        or _of_lower_ranks(plan, _free_weights(config, plan))
        or _forward_only(config, facts, plan)
    )


def _shallower(
    config: ServeConfig, facts: ModelFacts, plan: Plan, server_ranks: Mapping[str, int]
) -> Plan | None:
    rule, split = RULES[config.aggregation], facts.layout.cut_below(plan.split)
    is_whole = plan.split == facts.layout.num_blocks
    if (
        split < config.planning.min_split
        or rule.needs_whole_model
        or (is_whole and config.planning.split == "fixed")
    ):
        return None
    given_up = facts.weights(split, plan.split)
    if rule.needs_equal_ranks and any(server_ranks[n] != plan.ranks[n] for n in given_up):
        return None
    return replace(
        plan,
        split=split,
        ranks={n: rank for n, rank in plan.ranks.items() if n not in given_up},
        alphas={n: alpha for n, alpha in plan.alphas.items() if n not in given_up},
        tail=config.labels == "device",
    )


def _free_weights(config: ServeConfig, plan: Plan) -> set[str]:
    """Return the weights whose rank may fall: a rank by `lora.rank_pattern` is to stay."""
    if RULES[config.aggregation].needs_equal_ranks:
        return set()
    return {name for name in plan.ranks if config.lora.rank_of(name, -1) < 0}


def _of_lower_ranks(plan: Plan, free: Collection[str]) -> Plan | None:
    ranks = {n: rank // 2 if n in free and rank > 1 else rank for n, rank in plan.ranks.items()}
    return replace(plan, ranks=ranks) if ranks != plan.ranks else None


def _forward_only(config: ServeConfig, facts: ModelFacts, plan: Plan) -> Plan | None:
    is_whole = plan.split == facts.layout.num_blocks  # nobody would train anything with its samples
    given = plan.ranks.keys() - _free_weights(config, plan)
    if plan.is_forward_only or is_whole or any(plan.ranks[n] for n in given):
        return None
    return replace(plan, ranks=dict.fromkeys(plan.ranks, 0))


def difference(old: Plan, new: Plan) -> str:
    """Say in a few words what a smaller plan takes away."""
    found = [
        f"{what} {was} -> {now}"
        for what, was, now in (
            ("micro-batch", old.micro_batch, new.micro_batch),
            ("micro-batches under way", old.in_flight, new.in_flight),
            ("split", old.split, new.split),
        )
        if was != now
    ]
    if new.is_forward_only and not old.is_forward_only:
        return ", ".join([*found, "computes forward only"])
    most, least = (max(plan.ranks.values(), default=0) for plan in (old, new))
    if most != least:
        found.append(f"largest rank {most} -> {least}")
    elif old.split == new.split and (all_ := sum(old.ranks.values())) != sum(new.ranks.values()):
        found.append(f"ranks of {all_} -> {sum(new.ranks.values())} in all")
    return ", ".join(found) or "nothing"
