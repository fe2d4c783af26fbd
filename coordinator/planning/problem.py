"""What plans are made from, and what of it is settled before anything is computed.

It knows no memory estimate (`costs.py`) and no rule by which plans are chosen (`joint.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, TypeVar

from coordinator.aggregation.rules import RULES, SERVER
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.cuts import allowed_cuts, given_split
from coordinator.planning.ranks import possible_ranks
from coordinator.planning.splits import SPLIT_RULES, Option, SplitRule
from edge_sdk.lora.folding import folds
from edge_sdk.lora.targets import Coverage, ModelFacts
from edge_sdk.protocol.plan import Plan
from profiler.estimate.sizes import ModelShape
from profiler.profile import DeviceProfile, problems

# Models take up to 131,072 positions; sequences of fine-tuning data are rarely that long.
LONGEST = 1024
# Costs that are remembered: a fleet of a thousand unequal devices asks for a tenth of them a round.
MOST_KNOWN = 200_000
# From round to round they may grow to so many times those of one round, where these are not few.
MOST_GROWTH, FEW_KNOWN = 2, 20_000
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProfile:
    """What a run may use of the coordinator's machine; None where it is unknown."""

    memory_bytes: float | None = None
    flops_per_s: float | None = None
    compute_bytes: int = 4
    """Bytes of an activation there."""

    @classmethod
    def here(cls, config: ServeConfig) -> ServerProfile:
        """Return what this machine has for the coordinator of a run; its speed is not measured."""
        import torch

        from edge_sdk.model.precision import resolve_compute
        from edge_sdk.runtime.torch_runtime import pick_device
        from profiler.sensors.memory import memory_info

        device = pick_device(config.device)
        free = memory_info().available.value
        if device.type == "cuda" and torch.cuda.is_available():
            free = float(torch.cuda.mem_get_info(device)[0])
        return cls(
            memory_bytes=config.planning.server_memory_bytes or free,
            compute_bytes=resolve_compute(config.compute, device).itemsize,
        )


class StepSize(NamedTuple):
    """How much of a step passes through a device at the same time."""

    micro_batch: int
    """Sequences that pass through the model together."""
    in_flight: int
    """Most micro-batches that are under way at the same time."""


def step_of(plan: Plan) -> StepSize:
    """Return how much of a step *plan* puts through a device at the same time."""
    return StepSize(plan.micro_batch, plan.in_flight)


class KnownCosts(dict[Hashable, Any]):
    """Costs that were found before, for all problems of one config, model, length and server.

    Two threads may share it: what one of them writes the other at worst finds again.
    """

    def __init__(self, *about: object) -> None:
        super().__init__()
        self._about = about
        self._kinds: dict[Hashable, int] = {}
        self._numbers = count()
        self._first_len: int | None = None  # after the first round since it was empty

    def is_about(self, *about: object) -> bool:
        """Return whether it holds what is true of *about*, these very objects."""
        return len(about) == len(self._about) and all(map(lambda a, b: a is b, about, self._about))

    def number_of(self, facts: Hashable) -> int:
        """Return a number of its own for *facts*, always the same."""
        return self._kinds.setdefault(facts, next(self._numbers))

    def round_ended(self) -> None:
        """Begin anew where most may be of boards, ranks or importance that are gone."""
        if self._first_len is None:
            self._first_len = len(self)
        elif len(self) > max(FEW_KNOWN, MOST_GROWTH * self._first_len):
            self.clear()
            self._kinds.clear()  # numbers go on: what has an old one keeps it
            self._first_len = None

    def of(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what is known under *key*, which says all that *make* depends on."""
        try:
            found: T = self[key]
        except KeyError:
            if len(self) >= MOST_KNOWN:
                self.clear()
            found = self[key] = make()
        return found


@dataclass(frozen=True, kw_only=True)
class PlanningProblem:
    """Everything that plans depend on; equal problems get equal plans."""

    config: ServeConfig
    facts: ModelFacts
    model: ModelShape
    profiles: Mapping[str, DeviceProfile]
    """Devices to plan for, by name."""
    server: ServerProfile = ServerProfile()
    length: int
    """Tokens in the longest sequence that plans must have room for."""
    importance: Mapping[str, float] | None = None
    """Global importance of adapted weights; None: not measured yet, so all count alike."""
    frozen: Mapping[str, str] = field(default_factory=dict)
    """Devices that compute forward only, each with why it cannot train."""
    coverage: Coverage | None = None
    """How much of the blocks has adapters, for people; None: not asked for."""
    steps: Mapping[str, StepSize] = field(default_factory=dict)
    """Devices that could not hold the config's micro-batches, each with what it can."""
    known: KnownCosts = field(default_factory=KnownCosts, compare=False, repr=False)
    """What `costs.py` has asked the estimates already; problems that are made of this one by
    `replace` share it."""

    def __post_init__(self) -> None:
        about = self.config, self.facts, self.model, self.length, self.server
        if not self.known.is_about(*about):
            object.__setattr__(self, "known", KnownCosts(*about))

    def updated(
        self,
        profiles: Mapping[str, DeviceProfile],
        importance: Mapping[str, float] | None,
        steps: Mapping[str, StepSize],
    ) -> PlanningProblem:
        """Return the problem with what may change while a run goes on; itself where nothing has."""
        if (self.profiles, self.importance, self.steps) == (profiles, importance, steps):
            return self
        profiles, steps = dict(profiles), dict(steps)
        found = replace(self, profiles=profiles, importance=importance, steps=steps)
        vars(found)["_options"] = {k: own for k, own in self._options.items() if k[0] in profiles}
        if self.importance == importance:
            vars(found)["tables"] = self.tables
        return found

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return self.facts.layout.num_blocks

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Numbers of blocks that a plan may give a device."""
        return allowed_cuts(self.config.planning, self.facts.layout)

    @cached_property
    def _by_block(self) -> list[list[str]]:
        blocks: list[list[str]] = [[] for _ in range(self.num_blocks)]
        for name in self.facts.targets:
            blocks[self.place(name)[0]].append(name)
        return blocks

    def weights(self, first: int, stop: int) -> list[str]:
        """Return the adapted weights of blocks first .. stop-1."""
        return [name for block in self._by_block[first:stop] for name in block]

    @cached_property
    def _places(self) -> dict[str, tuple[int, str]]:
        path = f"{self.facts.layout.blocks_path}."
        split = {name: name.removeprefix(path).partition(".") for name in self.facts.targets}
        return {name: (int(block), inside) for name, (block, _, inside) in split.items()}

    def place(self, weight: str) -> tuple[int, str]:
        """Return the block of an adapted weight, and its name inside the block."""
        return self._places[weight]

    @cached_property
    def input_ids(self) -> dict[str, int]:
        """Which layers of a block read the same input, by name inside the block."""
        return {linear.name: linear.input_id for linear in self.model.linears}

    @cached_property
    def is_fixed(self) -> bool:
        """Whether the config leaves nothing to plan."""
        return self.config.planning.split == self.config.planning.ranks == "fixed"

    @property
    def split_rule(self) -> SplitRule:
        """How split points are chosen."""
        return SPLIT_RULES[self.config.planning.split]

    def importance_of(self, weight: str) -> float:
        """Return the importance of a weight; one not measured counts as the mean of the others."""
        if not self.importance:
            return 1.0
        return self.importance.get(weight, self._mean_importance)

    @cached_property
    def tables(self) -> KnownCosts:
        """What ranks are worth beside what they cost, as far as it was asked: by importance.

        By kinds of devices, not by device, and shared by all problems of one importance.
        """
        return KnownCosts()

    def option_table(self, device: str, make: Callable[[], list[Option]]) -> list[Option]:
        """Return the options of a device: as they were before, where they depend on nothing new."""
        key = device, self.kind(device)
        about = self.profile(device), self.residual_rank
        held = self._options.get(key)
        if held is None or held[0] != about:
            held = self._options[key] = about, make()
        return held[1]

    @cached_property
    def _options(self) -> dict[tuple[str, int], tuple[Hashable, list[Option]]]:
        """Options of devices by name and kind, each with what else they depend on."""
        return {}

    @cached_property
    def _mean_importance(self) -> float:
        return math.fsum((self.importance or {}).values()) / max(1, len(self.importance or {}))

    # ---- one device ----

    def settings(self, device: str) -> DeviceSettings:
        """Return what the config gives a device."""
        own = device if device in self.config.devices else ""
        found = self._settings.get(own)
        if found is None:
            found = self._settings[own] = self.config.settings(own)
        return found

    @cached_property
    def _settings(self) -> dict[str, DeviceSettings]:
        return {}

    @cached_property
    def codecs(self) -> dict[tuple[str, int], str]:
        """What `costs.py` has chosen already for devices at their splits."""
        return {}

    def kind(self, device: str) -> int:
        """Return a number that devices share whose work, and the ranks that they may have, are one.

        They may differ in memory, speed and link.
        """
        if device not in self._kinds:
            self._kinds[device] = self.known.number_of(self._kind_facts(device))
        return self._kinds[device]

    @cached_property
    def _kinds(self) -> dict[str, int]:
        return {}

    def _kind_facts(self, device: str) -> Hashable:
        settings, pin = self.settings(device), self.pinned_rank(device)
        if device == SERVER:
            return SERVER, pin
        own = self.profile(device)
        widths = own.linear_bytes, own.base_bytes, own.compute_bytes, own.recompute
        is_unknown = own.memory_bytes is None
        return settings, pin, self.steps.get(device), widths, is_unknown

    def profile(self, device: str) -> DeviceProfile:
        """Return what a device says of itself, less nonsense on which nothing depends."""
        own = self.profiles[device]
        return DeviceProfile() if self.is_fixed and problems(own) else own

    def budget_bytes(self, device: str) -> float:
        """Return the bytes that a plan may use on a device or `SERVER`; infinite where unknown."""
        planning = self.config.planning
        if device == SERVER:
            memory = planning.server_memory_bytes or self.server.memory_bytes
        else:
            memory = self.profile(device).memory_bytes
        return math.inf if memory is None else memory * (1.0 - planning.memory_margin)

    def limit_bytes(self, device: str) -> float:
        """Return the budget as a limit: a fixed config has none, it runs whether it fits or not."""
        return math.inf if self.is_fixed else self.budget_bytes(device)

    def pinned_split(self, device: str) -> int | None:
        """Return the split of a device that cannot be chosen; None where it can.

        Without a memory budget nothing can be chosen: such a device runs what the config says. So
        does one that computes forward only: a deeper split would be faster and learn less.
        """
        own = self.config.devices.get(device)
        split = own.split if own else None
        if split is None and device in self.frozen and self.config.planning.split != "fixed":
            return self.cuts[0]
        is_known = self.profile(device).memory_bytes is not None
        is_frozen = self.pinned_rank(device) == 0
        if split is None and (self.config.planning.split == "fixed" or is_frozen or not is_known):
            split = self.settings(device).split
            assert split is not None
            split = given_split(self.config.planning, self.facts.layout, split, is_own=False)
        return self.num_blocks if split == "all" else split

    def micro_batch(self, device: str) -> int:
        """Return how many sequences pass through the model together."""
        if device in self.steps:
            return self.steps[device].micro_batch
        settings = self.settings(device)
        assert settings.batch_size is not None
        return settings.micro_batch or settings.batch_size

    def in_flight(self, device: str) -> int:
        """Return how many micro-batches are under way at the same time."""
        if device in self.steps:
            return self.steps[device].in_flight
        settings = self.settings(device)
        assert settings.batch_size is not None
        assert settings.in_flight is not None
        return min(settings.in_flight, settings.batch_size // self.micro_batch(device))

    def stepped(self, device: str, plan: Plan) -> Plan:
        """Return a device's plan with the micro-batches that it can hold."""
        own = self.steps.get(device)
        return replace(plan, **own._asdict()) if own else plan

    @property
    def server_speed(self) -> float | None:
        """The coordinator's floating-point operations a second."""
        return self.config.planning.server_flops_per_s or self.server.flops_per_s

    def tokens(self, device: str) -> int:
        """Return the tokens in a device's micro-batch."""
        return self.micro_batch(device) * self.length

    # ---- ranks ----

    @cached_property
    def _rank_set(self) -> dict[str, list[int]]:
        return possible_ranks(self.config.planning.rank_set, self.facts.targets)

    def pinned_rank(self, device: str) -> int | None:
        """Return the rank of a device, or of `SERVER`, that cannot be chosen; None where it can."""
        config = self.config
        if device in self.frozen:
            return 0
        own = config.devices.get(device)
        rank = config.server_rank if device == SERVER else own.r if own else None
        if rank is None and config.planning.ranks == "fixed":
            rank = config.lora.r if device == SERVER else self.settings(device).r
        return rank

    def ranks(self, device: str, weight: str) -> list[int]:
        """Return the ranks that a weight may have on a device or `SERVER`, the smallest first."""
        key = ("ranks", self.kind(device), weight)
        return self.known.of(key, lambda: self._find_ranks(device, weight))

    def _find_ranks(self, device: str, weight: str) -> list[int]:
        lora, pin = self.config.lora, self.pinned_rank(device)
        rank = lora.rank_of(weight, -1 if pin is None else pin)
        if rank >= 0:
            return [rank]
        found = self._rank_set[weight]
        if device == SERVER or self.profile(device).memory_bytes is not None:
            return found
        # Memory unknown: nothing above what the config would give.
        most = self.settings(device).r or 0
        allowed = [rank for rank in found if rank <= most]
        return allowed if len(allowed) > 1 else [min(most, *self.facts.targets[weight])]

    def first_rank(self, device: str, weight: str) -> int:
        """Return the rank that a split is priced with: the least that lets the weight learn.

        A split that left no room for it would spare the coordinator work and train nothing.
        """
        return next((rank for rank in self.ranks(device, weight) if rank > 0), 0)

    @cached_property
    def residual_rank(self) -> int:
        """Ranks of the frozen residual, once everybody has learned something.

        The sum of everybody's largest ranks, which the joined update cannot exceed, and where all
        go on with the same factors those as well; 0 under rules that hand out factors alone.
        Whoever is frozen now may train later. With an exchange of its own, a device holds its own
        factors once more as the coordinator knows them, and these times a share of them beside
        the residual.
        """
        if self.frozen:
            return replace(self, frozen={}).residual_rank
        rule = RULES[self.config.aggregation]
        if not rule.has_residual:
            return 0
        most = {device: self._most_rank(device) for device in (SERVER, *self.profiles)}
        total = min(sum(most.values()), max(min(shape) for shape in self.facts.targets.values()))
        if rule.redistribute is not None:
            total += max(most.values())
        return total if self.config.exchange.is_plain else total + 2 * max(most.values())

    def freezing(self, frozen: Mapping[str, str]) -> PlanningProblem:
        """Return the problem with devices that compute forward only, each with the reason."""
        found = replace(self, frozen=frozen)
        # The same, and long to find.
        vars(found).update(
            residual_rank=self.residual_rank, tables=self.tables, _options=self._options
        )
        return found

    def _most_rank(self, device: str) -> int:
        def make() -> int:
            return max(self.ranks(device, weight)[-1] for weight in self.facts.targets)

        return self.known.of(("most rank", self.kind(device)), make)

    def folds(self, device: str) -> bool:
        """Return whether a device, or `SERVER`, adds the residual to its frozen weights."""
        if device == SERVER:
            return folds(self.config.residual, is_quantized=self.config.is_quantized)
        profile, own = self.profile(device), self.settings(device).residual
        is_quantized = profile.linear_bytes is not None and profile.base_bytes != 2
        return folds(own or self.config.residual, is_quantized=is_quantized)


def planning_length(config: ServeConfig, positions: int) -> int:
    """Return the tokens to plan for: `max_length`, or what the model takes up to LONGEST."""
    return config.max_length or min(positions, LONGEST)
