"""Plan a whole run: split points and ranks of every device and of the coordinator (ARMSC).

Pure: a problem in, plans with their reasons out. Split points come from `splits.py`, ranks from
`ranks.py`, prices from `costs.py`. When to plan again is `replan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

from coordinator.aggregation.rules import RULES, SERVER
from coordinator.config.run import AUTO
from coordinator.planning.costs import (
    LINK_SHARE,
    Load,
    Ranks,
    adapter_budget,
    adapters_bytes,
    codec_of,
    device_bytes,
    device_loads,
    device_seconds,
    link_shares,
    options,
    server_side,
    server_widths,
)
from coordinator.planning.fixed import by_hand, make_plan
from coordinator.planning.frozen_devices import cannot_train, in_time
from coordinator.planning.objective import server_bytes, server_wave_seconds, slowest, utility
from coordinator.planning.plan_set import DeviceExplanation, Explanation, PlanSet, ServerExplanation
from coordinator.planning.pricing.rank_tables import rank_tables
from coordinator.planning.problem import PlanningProblem
from coordinator.planning.ranks import Knapsack, UniformRanks
from coordinator.planning.splits import SPLIT_RULES, Option, Splits, fitting
from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.protocol.plan import Plan
from profiler.profile import problems

T = TypeVar("T")


def plan_all(problem: PlanningProblem) -> PlanSet:
    """Return the best plans for a problem.

    A device that cannot train computes forward only; one that cannot take part at all is refused by
    name, and the others are planned without it.

    Raises:
        ConfigError: the coordinator is too small for what the devices leave to it, or the config
            asks for what nobody can do.
    """
    return Draft(problem).whole()


class OwnPlan(NamedTuple):
    """What one device gets of a plan for all."""

    plan: Plan
    why: DeviceExplanation


class Draft:
    """The splits of a plan for all; ranks and reasons are found for those that are asked about.

    So a device that joins costs what all share, and its own.
    """

    def __init__(self, problem: PlanningProblem) -> None:
        """Choose the split points, as `plan_all`.

        Raises:
            ConfigError: the coordinator is too small for what the devices leave to it.
        """
        tables, refused = _tables(problem, problem.profiles)
        if frozen := cannot_train(problem, tables):
            problem = problem.freezing(frozen)
            again, refused_again = _tables(problem, frozen)  # the others' options are as they were
            tables = dict(sorted({**tables, **again}.items()))
            refused = {d: why for d, why in refused.items() if d not in frozen} | refused_again
        self._problem, self._tables = problem, tables
        self._splits = _split(problem, tables)
        self.refused: dict[str, str] = refused
        """Devices that cannot take part, each with the reason."""

    @property
    def server_weights(self) -> list[str]:
        """Weights that the coordinator trains."""
        return list(_server_loads(self._problem, self._splits))

    def ranks(self, who: str) -> dict[str, int]:
        """Return the ranks of a device that takes part, or of `SERVER`.

        Raises:
            ConfigError: the config asks for what cannot be.
        """
        if RULES[self._problem.config.aggregation].needs_equal_ranks or "all_ranks" in vars(self):
            return self.all_ranks[who]
        return _ranks(self._problem, self._splits, who)

    @cached_property
    def all_ranks(self) -> dict[str, dict[str, int]]:
        """Ranks of every device and of the coordinator."""
        problem, splits = self._problem, self._splits
        found = {who: _ranks(problem, splits, who) for who in (*splits.chosen, SERVER)}
        if RULES[problem.config.aggregation].needs_equal_ranks:
            found = _made_equal(problem, found)
        return found

    def part(self, device: str) -> OwnPlan:
        """Return what a device gets.

        Raises:
            RefusedError: it cannot take part.
            ConfigError: the config asks for what cannot be.
        """
        if device in self.refused:
            raise RefusedError(self.refused[device])
        problem, splits = self._problem, self._splits
        split, ranks = splits.chosen[device].split, self.ranks(device)
        plan = make_plan(problem.config, problem.facts, device, split, ranks)
        plan = problem.stepped(device, plan)
        return OwnPlan(plan, _story(problem, device, self._tables[device], splits, plan))

    def whole(self) -> PlanSet:
        """Return what everybody gets.

        Raises:
            ConfigError: the config asks for what cannot be.
        """
        problem, splits, ranks = self._problem, self._splits, self.all_ranks[SERVER]
        parts = {device: self.part(device) for device in splits.chosen}
        plans = {device: part.plan for device, part in parts.items()}
        stories = {device: part.why for device, part in parts.items()}
        server = _server_story(problem, splits, ranks)
        return PlanSet(
            plans=plans,
            server_ranks=ranks,
            refused=self.refused,
            wave_s=slowest([*(own.device_s for own in stories.values()), server.server_s]),
            utility=utility(problem, plans, ranks),
            explanation=Explanation(devices=stories, server=server, notes=_notes(problem)),
        )


# ---- split points ----


def _tables(
    problem: PlanningProblem, devices: Iterable[str]
) -> tuple[dict[str, list[Option]], dict[str, str]]:
    """Return the options of each of *devices* that is able, and why the others are not."""
    tables, refused = {}, {}
    for device in sorted(devices):
        wrong = problems(problem.profile(device))
        if wrong:
            refused[device] = f"its profile cannot be true: {'; '.join(wrong)}"
            continue
        try:
            own = in_time(problem, device, options(problem, device))
            pin = problem.pinned_split(device)
            fitting(device, own, problem.limit_bytes(device), pin)
        except ConfigError as error:
            refused[device] = f"{error}{_floor_note(problem, device)}"
        else:
            tables[device] = own
    return tables, refused


def _floor_note(problem: PlanningProblem, device: str) -> str:
    """Say that a device might take part with fewer blocks than `planning.min_split` allows."""
    least = problem.config.planning.min_split
    if least == 1 or problem.pinned_split(device) is not None:
        return ""
    return f"; planning.min_split {least} gives it no fewer blocks"


def _split(problem: PlanningProblem, tables: Mapping[str, list[Option]]) -> Splits:
    budgets = {device: problem.limit_bytes(device) for device in tables}
    pins = {d: pin for d in tables if (pin := problem.pinned_split(d)) is not None}
    rule = problem.split_rule
    if rule.weighs_time and problem.server_speed is None:
        rule = SPLIT_RULES["memory"]
    return rule.choose(tables, budgets, server_side(problem), pins)


# ---- ranks ----


def _ranks(problem: PlanningProblem, splits: Splits, who: str) -> dict[str, int]:
    """Return the ranks of a device or of the coordinator, before they are made equal."""
    if who == SERVER:
        loads, budget = _server_loads(problem, splits), _server_adapter_budget(problem, splits)
    else:
        split = splits.chosen[who].split
        loads, budget = device_loads(problem, who, split), adapter_budget(problem, who, split)
    return _choose(problem, who, loads, budget)


def _choose(
    problem: PlanningProblem, device: str, loads: Mapping[str, Load], budget_bytes: float
) -> dict[str, int]:
    """Return the ranks of a device, or of `SERVER`, on the weights that have *loads*."""
    possible = _possible(problem, device, loads)
    if all(len(ranks) == 1 for ranks in possible.values()):
        return {name: ranks[0] for name, ranks in possible.items()}
    found = RANK_RULES[problem.config.planning.ranks](problem, device, loads, budget_bytes)
    cap = problem.config.planning.adapter_bytes
    if device != SERVER and cap is not None and not any(found.values()):
        raise ConfigError(
            f"planning.adapter_bytes: {cap:g} bytes hold no adapter of the smallest rank on "
            f"device {device!r}; raise it, or remove it"
        )
    return found


def _possible(
    problem: PlanningProblem, device: str, loads: Mapping[str, Load]
) -> dict[str, list[int]]:
    def make() -> dict[str, list[int]]:
        return {name: problem.ranks(device, name) for name in loads}

    return _once(problem, device, loads, "possible", make)


def _once(
    problem: PlanningProblem,
    device: str,
    loads: Mapping[str, Load],
    what: str,
    make: Callable[[], T],
) -> T:
    """Return what devices of a kind share that have as many blocks, made once."""
    if device == SERVER:  # what passes through its blocks depends on all devices
        return make()
    return problem.tables.of((what, problem.kind(device), len(loads)), make)


def _uniform(
    problem: PlanningProblem, device: str, loads: Mapping[str, Load], budget_bytes: float
) -> dict[str, int]:
    """Return the largest one rank that fits."""

    def make() -> UniformRanks:
        possible = _possible(problem, device, loads)
        return UniformRanks(possible, partial(adapters_bytes, problem, loads=loads))

    return _once(problem, device, loads, "uniform", make).choose(budget_bytes)


def _by_importance(
    problem: PlanningProblem, device: str, loads: Mapping[str, Load], budget_bytes: float
) -> dict[str, int]:
    """Return the ranks of the largest value."""

    def make() -> Knapsack:
        return Knapsack(rank_tables(problem, device, loads))

    return _once(problem, device, loads, "knapsack", make).choose(budget_bytes)


RankRule = Callable[[PlanningProblem, str, Mapping[str, Load], float], dict[str, int]]
RANK_RULES: dict[str, RankRule] = {
    "fixed": _by_importance,  # nearly all ranks are pinned
    "uniform": _uniform,
    "rngwp": _by_importance,
}
"""The choices of `planning.ranks`: what ranks the weights with loads get within a budget."""


def _made_equal(
    problem: PlanningProblem, ranks: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """Give everybody the smallest rank of all; weights whose rank is given keep it."""
    free = {w for own in ranks.values() for w in own if problem.config.lora.rank_of(w, -1) < 0}
    own_most = [[r for w, r in own.items() if w in free] for own in ranks.values()]
    most = min((max(own) for own in own_most if own), default=0)
    return {
        name: {w: min(r, most) if w in free else r for w, r in own.items()}
        for name, own in ranks.items()
    }


def _server_loads(problem: PlanningProblem, splits: Splits) -> dict[str, Load]:
    """Return what passes through each of the coordinator's weights."""
    found: dict[str, Load] = {}
    at: dict[int, list[int]] = {}
    for device, option in splits.chosen.items():
        at.setdefault(option.split, []).append(problem.tokens(device))
    first, most = _first(problem, splits), problem.config.devices_per_round
    rows = [tokens for split, own in at.items() if split < first for tokens in own]
    for block in range(first, problem.num_blocks):
        # The most that come in one round, where not all devices are in it.
        rows = sorted(rows + at.get(block, []), reverse=True)[:most]
        load = Load(sum(rows), problem.config.open_micros, *server_widths(problem))
        found |= dict.fromkeys(problem.weights(block, block + 1), load)
    return found


def _first(problem: PlanningProblem, splits: Splits) -> int:
    return min((o.split for o in splits.chosen.values()), default=problem.num_blocks)


def _server_adapter_budget(problem: PlanningProblem, splits: Splits) -> float:
    """Return the bytes that the coordinator has left for adapters."""
    loads = _server_loads(problem, splits)
    first = {name: problem.first_rank(SERVER, name) for name in loads}
    base = splits.server_bytes - adapters_bytes(problem, first, loads)
    return problem.limit_bytes(SERVER) - base


def _depths(splits: Splits) -> dict[str, int]:
    return {device: option.split for device, option in splits.chosen.items()}


# ---- why ----


def _story(
    problem: PlanningProblem, device: str, table: list[Option], splits: Splits, plan: Plan
) -> DeviceExplanation:
    loads = device_loads(problem, device, plan.split)
    return DeviceExplanation(
        budget_bytes=problem.budget_bytes(device),
        options=tuple(table),
        binding=splits.binding[device],
        planned_bytes=device_bytes(problem, device, plan.split, plan.ranks),
        adapter_bytes=adapters_bytes(problem, plan.ranks, loads),
        adapter_budget_bytes=adapter_budget(problem, device, plan.split),
        device_s=device_seconds(problem, device, plan.split, plan.ranks),
        server_s=None if problem.server_speed is None else splits.chosen[device].server_s,
        notes=_device_notes(problem, device, plan),
    )


def _device_notes(problem: PlanningProblem, device: str, plan: Plan) -> tuple[str, ...]:
    profile, found = problem.profile(device), _codec_notes(problem, device, plan)
    if problem.is_fixed:
        peak = device_bytes(problem, device, plan.split, plan.ranks)
        is_large = peak > problem.budget_bytes(device)
        return (*found, *("the config gives it more than fits its memory" for _ in range(is_large)))
    if device in problem.frozen:
        found.append(f"computes forward only: {problem.frozen[device]}")
    if profile.memory_bytes is None:
        found.append("memory unknown: split and largest rank as in the config")
    elif profile.overhead_bytes is None:
        found.append("overhead_bytes unknown: counted as 0")
    if problem.split_rule.weighs_time:
        unknown = [
            name
            for name in ("flops_per_s", "up_bytes_per_s", "down_bytes_per_s")
            if getattr(profile, name) is None
        ]
        if unknown:
            found.append(f"{', '.join(unknown)} unknown: only memory decides its split")
    return tuple(found)


def _codec_notes(problem: PlanningProblem, device: str, plan: Plan) -> list[str]:
    """Say which codec `auto` stands for, and why."""
    if problem.config.settings(device).codec != AUTO or plan.split == problem.num_blocks:
        return []
    codec = codec_of(problem, device, plan.split)
    shares = link_shares(problem, device, plan.split)
    if shares is None:
        return [f"codec {codec}: speed or link unknown"]
    told = ", ".join(f"{share:.0%} with {name}" for name, share in shares.items())
    is_short = shares[codec] > LINK_SHARE
    why = f"{LINK_SHARE:.0%} is enough" if not is_short else f"above {LINK_SHARE:.0%} all the same"
    return [f"codec {codec}: its link takes, of its computing time, {told}; {why}"]


def _server_story(problem: PlanningProblem, splits: Splits, ranks: Ranks) -> ServerExplanation:
    loads = _server_loads(problem, splits)
    return ServerExplanation(
        first=_first(problem, splits),
        budget_bytes=problem.budget_bytes(SERVER),
        planned_bytes=server_bytes(problem, _depths(splits), ranks),
        adapter_bytes=adapters_bytes(problem, ranks, loads),
        adapter_budget_bytes=_server_adapter_budget(problem, splits),
        server_s=server_wave_seconds(problem, _depths(splits), ranks),
    )


def _notes(problem: PlanningProblem) -> tuple[str, ...]:
    config = problem.config
    found = [*by_hand(config), f"sequences of up to {problem.length} tokens"]
    if config.planning.min_split > 1:
        least = config.planning.min_split
        found.append(f"planning.min_split {least}: no device runs fewer blocks")
    if problem.split_rule.weighs_time and problem.server_speed is None:
        found.append("planning.server_flops_per_s unknown: only memory decides the splits")
    if not math.isfinite(problem.budget_bytes(SERVER)):
        found.append("planning.server_memory_bytes unknown: the coordinator holds everything")
    if problem.importance is None and config.planning.measures_importance:
        found.append("importance not measured yet: all weights alike")
    return tuple(found)
