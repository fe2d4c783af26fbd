"""Which devices cannot train, and so compute forward only: frozen blocks, adapters elsewhere. Pure.

Such a device has no memory for a backward pass, or misses `planning.deadline_s` even at its
shallowest split. Its samples go on training the coordinator's blocks (SplitFrozen, arXiv
2503.18986).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.aggregation.rules import RULES
from coordinator.planning.costs import options
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.splits import Option, fitting
from edge_sdk.errors import ConfigError
from profiler.profile import problems


def in_time(problem: PlanningProblem, device: str, table: Sequence[Option]) -> list[Option]:
    """Return the splits of a device that keep `planning.deadline_s`; all where none does."""
    deadline_s = problem.config.planning.deadline_s
    if deadline_s is None or problem.pinned_split(device) is not None:
        return list(table)
    fast = [o for o in table if o.device_s is None or o.device_s <= deadline_s]
    return fast or list(table)


def cannot_train(
    problem: PlanningProblem, tables: Mapping[str, Sequence[Option]]
) -> dict[str, str]:
    """Return why each device computes forward only that might have trained.

    Args:
        problem: The situation.
        tables: Each device's splits, of those that can train at all.
    """
    if RULES[problem.config.aggregation].needs_equal_ranks:
        return {}
    found = {}
    for device in problem.profiles:
        why = _why(problem, device, tables.get(device))
        if why is not None and _helps(problem, device, why):
            found[device] = why
    return found


def _why(problem: PlanningProblem, device: str, table: Sequence[Option] | None) -> str | None:
    """Say why a device cannot train; None where it can, or is not to be judged."""
    if table is None:
        is_nonsense = problems(problem.profiles[device])
        return None if is_nonsense else "its memory cannot hold a backward pass"
    deadline_s = problem.config.planning.deadline_s
    pin, limit = problem.pinned_split(device), problem.limit_bytes(device)
    times = [option.device_s for option in fitting(device, table, limit, pin)]
    known = [time_s for time_s in times if time_s is not None]
    if deadline_s is None or not known or min(known) <= deadline_s:
        return None
    return f"it trains a micro-batch in {min(known):.3g} s, planning.deadline_s is {deadline_s:g}"


def _helps(problem: PlanningProblem, device: str, why: str) -> bool:
    """Return whether a device can take part without training, and its ranks are free."""
    is_unknown = problem.profile(device).memory_bytes is None
    if is_unknown or problem.pinned_rank(device) is not None:
        return False  # nothing about it is free to choose
    frozen = problem.freezing({device: why})
    split = frozen.pinned_split(device)
    if split is None or split == problem.num_blocks:
        return False  # nobody would train anything with its samples
    if any(frozen.first_rank(device, weight) for weight in problem.weights(0, split)):
        return False  # `lora.rank_pattern` asks for training
    try:
        fitting(device, options(frozen, device), frozen.limit_bytes(device), split)
    except ConfigError:
        return False
    return True
