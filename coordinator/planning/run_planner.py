"""Who runs what, from the first device to the last round: the planning of one run as it goes on.

It keeps profiles, importance and the plans in force; what the plans are is decided by the pure
functions of `joint.py` and `replan.py`. It knows no network and no engine.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Mapping
from copy import copy, deepcopy
from dataclasses import asdict, replace
from itertools import accumulate
from statistics import median
from typing import Any

import numpy as np

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.rules import SERVER
from coordinator.config.run import AUTO, ServeConfig
from coordinator.planning.costs import UNKNOWN_CODEC, codec_of, device_bytes, device_flops
from coordinator.planning.fixed import plan_device, plan_server
from coordinator.planning.interface import Planning
from coordinator.planning.joint import Draft, plan_all
from coordinator.planning.ladder import difference, smaller
from coordinator.planning.plan_set import Decision, PlanSet
from coordinator.planning.problem import PlanningProblem, StepSize, step_of
from coordinator.planning.replan import plan_less, replan
from edge_sdk.errors import OutOfMemory, RefusedError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.importance import Smoothing, combine
from edge_sdk.lora.rank_pruning import pruned_rank
from edge_sdk.lora.targets import ModelFacts
from edge_sdk.protocol.plan import Plan
from profiler.profile import DeviceProfile, problems

# A device that missed so many of its last rounds gets a smaller plan.
MISSED_ROUNDS, WATCHED_ROUNDS = 2, 3


class Planner:
    """Plans of a run, and what they are made from."""

    def __init__(
        self, config: ServeConfig, facts: ModelFacts, start: PlanningProblem | None
    ) -> None:
        self._config, self._facts = config, facts
        self._start = start
        self.profiles: dict[str, DeviceProfile] = {}
        """Profiles that devices have sent, by name."""
        self._caps: dict[str, float] = {}
        """Most bytes that devices are planned with after they ran out of memory."""
        self._speeds: dict[str, float] = {}
        """Operations a second that rounds have shown, for devices that could not measure theirs."""
        self._rates: dict[str, list[float]] = {}
        """Tokens a second of these devices, step by step, since the last round or plan."""
        self.plans: PlanSet | None = None
        """The plans in force; None before the first, and for a fixed config."""
        self._before = start
        """The problem that they were made for."""
        self._last = start  # the problem as it was last asked for: it knows many costs
        self._made: tuple[PlanningProblem, Draft] | None = None  # the last plans for everybody
        self._smoothing = Smoothing()
        self._pruned: dict[str, dict[str, int]] = {}
        """Ranks that devices have cut off themselves, by device and weight."""
        self._steps: dict[str, StepSize] = {}
        """Micro-batches of devices that ran out of memory."""
        self._gone: dict[str, tuple[DeviceProfile, Plan]] = {}
        """What devices offered and ran that were gone at the end of a round."""
        self._smaller: dict[str, Plan] = {}
        """Plans of devices that could not do theirs, until other ones are made."""
        self._fixed_first: int | None = None
        self._fixed_ranks: dict[str, int] | None = None
        """The coordinator's part where devices of a fixed config got less than that says."""
        self._shrunk: dict[str, str] = {}
        """Why devices got smaller plans since somebody asked."""
        self._rounds: dict[str, deque[bool]] = {}
        """Whether devices missed their last rounds, oldest first."""
        self._missing: set[str] = set()
        """Devices that missed the round that is not over."""

    @property
    def is_fixed(self) -> bool:
        """Whether the config leaves nothing to plan, so that nobody need be measured."""
        return self._start is None

    @property
    def _problem(self) -> PlanningProblem:
        """What plans are made from, as of now."""
        assert self._start is not None, "nothing is planned for a fixed config"
        importance = dict(self._smoothing.values) or None
        self._last = (self._last or self._start).updated(self.profiles, importance, self._steps)
        return self._last

    @property
    def importance(self) -> Mapping[str, float]:
        """Smoothed global importance by weight; empty before the first measurement."""
        return self._smoothing.values

    @property
    def server_ranks(self) -> dict[str, int] | None:
        """Ranks of the coordinator's own adapters; None where the config's hold.

        Plans that are made one by one may know of more: of blocks that a device has kept meanwhile.
        """
        first = self.first
        if self.plans is None or first is None:
            return self._fixed_ranks
        ranks, block_of = self.plans.server_ranks, self._facts.block_of
        return {name: rank for name, rank in ranks.items() if block_of(name) >= first}

    @property
    def first(self) -> int | None:
        """The coordinator's first block under the plans in force; None where the config's holds."""
        if self.plans is None:
            return self._fixed_first
        last = self._facts.layout.num_blocks
        return min((plan.split for plan in self.plans.plans.values()), default=last)

    # ---- devices come ----

    def profiled(self, device: str, profile: DeviceProfile) -> None:
        """Take in what a device offers.

        Raises:
            RefusedError: that cannot be true, or is too little for any plan.
            ConfigError: the coordinator is too small even for this device alone.
        """
        if wrong := problems(profile):
            raise RefusedError(
                f"its profile cannot be true: {'; '.join(wrong)}; correct `profile` in the "
                "device's config"
            )
        cap = self._caps.get(device)
        if cap is not None and (profile.memory_bytes is None or profile.memory_bytes > cap):
            profile = replace(profile, memory_bytes=cap)
        if profile.flops_per_s is None:
            profile = replace(profile, flops_per_s=self._speeds.get(device))
        else:
            self._speeds.pop(device, None)
        self._gone.pop(device, None)
        now = self._problem
        Draft(now.updated({device: profile}, now.importance, now.steps)).part(device)
        self._know({**self.profiles, device: profile})

    def _know(self, profiles: Mapping[str, DeviceProfile]) -> None:
        self.profiles = dict(sorted(profiles.items()))

    def plan(self, device: str) -> Plan | None:
        """Return the plan of a device; None where it has to wait for the others' profiles.

        Raises:
            RefusedError: it cannot take part.
            ConfigError: the config asks for what nobody can do.
        """
        if self.is_fixed:
            given = self._smaller.get(device) or plan_device(self._config, self._facts, device)
            pruned = self._pruned.get(device, {})
            ranks = {n: min(rank, pruned.get(n, rank)) for n, rank in given.ranks.items()}
            return replace(given, ranks=ranks)
        if self.plans is None or device not in self.profiles:
            return None
        if device not in self.plans.plans or self._is_outgrown(device):
            self._add(device)
        return self.plans.plans[device]

    def codec(self, device: str, plan: Plan) -> str:
        """Return how a device's hidden states and gradients travel under its plan."""
        codec = self._config.settings(device).codec
        if codec is not None and codec != AUTO:
            return codec
        return UNKNOWN_CODEC if self.is_fixed else codec_of(self._problem, device, plan.split)

    def _is_outgrown(self, device: str) -> bool:
        """Return whether a device's plan takes more than it offers by now."""
        return self._planned_bytes(device) > self._problem.budget_bytes(device)

    def _planned_bytes(self, device: str) -> float:
        """Return the bytes that a device's plan in force takes, by what it says of itself now."""
        assert self.plans is not None
        plan = self.plans.plans[device]
        return device_bytes(self._problem, device, plan.split, plan.ranks)

    def _add(self, device: str) -> None:
        """Plan for everybody, and give *device* its part; the others keep theirs until later."""
        now = self._problem
        if self._made is None or self._made[0] is not now:
            self._made = now, Draft(now)
        self._adopt(device, self._made[1])

    def _adopt(self, device: str, new: Draft) -> None:
        """Give *device* its part of *new*; the coordinator trains what it leaves to it."""
        assert self.plans is not None
        part, names, ranks = new.part(device), new.server_weights, self.plans.server_ranks
        if not ranks.keys() >= set(names):
            ranks = {**new.ranks(SERVER), **ranks}
        self._rates.pop(device, None)
        self._smaller.pop(device, None)
        told = {**self.plans.explanation.devices, device: part.why}
        self.plans = replace(
            self.plans,
            plans={**self.plans.plans, device: part.plan},
            server_ranks={name: ranks[name] for name in dict.fromkeys((*names, *ranks))},
            explanation=replace(self.plans.explanation, devices=told),
        )

    def begin(self, devices: Collection[str]) -> PlanSet:
        """Make the first plans, for *devices* that have all told what they offer.

        Raises:
            ConfigError: the coordinator is too small for what they leave to it.
        """
        self._know({d: self.profiles[d] for d in devices})
        self.plans, self._before = plan_all(self._problem), self._problem
        return self.plans

    def is_known(self, device: str) -> bool:
        """Return whether a device has told what it offers."""
        return device in self.profiles

    # ---- a plan was too much ----

    def ran_out_of_memory(self, device: str) -> None:
        """Plan less for a device that could not hold its plan.

        Raises:
            OutOfMemory: there is no smaller plan; the one that it has stays.
        """
        self._recall(device)
        old = self.plan_in_force(device)
        if old is None:
            return
        new = (self._give_smaller if self.is_fixed else self._give_what_fits)(device, old)
        if new is None:
            raise OutOfMemory(
                f"ran out of memory under the smallest plan that this run has for it: "
                f"{old.split} blocks, micro-batches of {old.micro_batch}; give it more memory, or "
                "lower max_length"
            )
        self._shrunk[device] = f"ran out of memory: {difference(old, new)}"

    def missed(self, device: str) -> None:
        """Take note that a device missed a round; one that keeps missing gets a smaller plan."""
        self._missing.add(device)
        rounds = self._note(device, missed=True)
        old = self.plan_in_force(device)
        if old is None or sum(rounds) < MISSED_ROUNDS:
            return
        if (new := self._give_smaller(device, old)) is not None:
            what = f"{sum(rounds)} of the last {len(rounds)} rounds"
            self._shrunk[device] = f"missed {what}: {difference(old, new)}"
            rounds.clear()

    def take_shrunk(self) -> dict[str, str]:
        """Return who got a smaller plan since the last call, each with why and what it lost."""
        found, self._shrunk = self._shrunk, {}
        return found

    def _recall(self, device: str) -> None:
        """Remember what a device ran that was gone at the end of a round, if it is not back yet."""
        if device in self._gone and self.plans is not None:
            profile, plan = self._gone.pop(device)
            self._know({**self.profiles, device: profile})
            self.plans = replace(self.plans, plans={**self.plans.plans, device: plan})

    def plan_in_force(self, device: str) -> Plan | None:
        """Return the plan that a device has; None where it has none, or is not known any more."""
        if self.is_fixed:
            return self.plan(device)
        if self.plans is None or device not in self.profiles:
            return None
        return self.plans.plans.get(device)

    def _note(self, device: str, *, missed: bool) -> deque[bool]:
        """Return whether a device missed its last rounds, the newest of them with this."""
        rounds = self._rounds.setdefault(device, deque(maxlen=WATCHED_ROUNDS))
        rounds.append(missed)
        return rounds

    def _give_smaller(self, device: str, old: Plan) -> Plan | None:
        """Give a device the next smaller plan, whatever fits; None where there is none."""
        new = smaller(
            self._config,
            self._facts,
            old,
            self._ranks_from(self._facts.layout.cut_below(old.split)),
        )
        if new is not None:
            self._smaller[device] = new
            self._take_smaller()
        return new

    def _take_smaller(self) -> None:
        """Let the plans in force be as small as they were made, until others are made."""
        if self.plans is None:
            if self._smaller:
                names = ("", *self._config.devices)
                plans = [plan_device(self._config, self._facts, name) for name in names]
                first = min(plan.split for plan in (*plans, *self._smaller.values()))
                self._fixed_first, self._fixed_ranks = first, self._ranks_from(first)
            return
        own = {d: plan for d, plan in self._smaller.items() if d in self.plans.plans}
        if own:
            first = min(plan.split for plan in own.values())
            self.plans = replace(
                self.plans,
                plans={**self.plans.plans, **own},
                server_ranks={**self._ranks_from(first), **self.plans.server_ranks},
            )

    def _ranks_from(self, first: int) -> dict[str, int]:
        """Return the coordinator's ranks for the blocks from *first* on, planned or not."""
        if self.plans is None:
            return plan_server(self._config, self._facts, first)
        names = self._facts.weights(first, self._facts.layout.num_blocks)
        return {n: self._problem.first_rank(SERVER, n) for n in names} | self.plans.server_ranks

    def _give_what_fits(self, device: str, old: Plan) -> Plan | None:
        """Plan for a device with less memory than its plan took; None where nothing is less."""
        ranks = self._ranks_from(self._facts.layout.cut_below(old.split))
        reduced = plan_less(self._problem, device, old, ranks)
        if reduced is None:
            return None
        self._caps[device] = reduced.memory_bytes
        self._steps[device] = step_of(reduced.plan)
        known = replace(self.profiles[device], memory_bytes=reduced.memory_bytes)
        self._know({**self.profiles, device: known})
        if reduced.draft is not None:
            self._adopt(device, reduced.draft)
        else:
            self._smaller[device] = reduced.plan
            self._take_smaller()
        return reduced.plan

    # ---- rounds end ----

    def stepped(self, device: str, num_tokens: int, compute_s: float) -> None:
        """Take in what a device computed in a step: its speed, where it could not measure that.

        Args:
            device: Whose step.
            num_tokens: Tokens of the step, without padding.
            compute_s: Seconds that it computed, without waiting.
        """
        profile = self.profiles.get(device)
        is_unknown = profile is not None and profile.flops_per_s is None
        if (is_unknown or device in self._speeds) and num_tokens > 0 and compute_s > 0.0:
            self._rates.setdefault(device, []).append(num_tokens / compute_s)

    def _learn_speeds(self) -> None:
        """Take speeds from the round's median steps: a plan's first ones may take far longer."""
        rates, self._rates = self._rates, {}
        now = None if self.plans is None else self._problem
        known = dict(self.profiles)
        for device, own in rates.items():
            plan = None if self.plans is None else self.plans.plans.get(device)
            if now is None or plan is None or device not in self.profiles:
                continue
            flops = device_flops(now, device, plan.split, plan.ranks)
            self._speeds[device] = flops / now.tokens(device) * median(own)
            known[device] = replace(known[device], flops_per_s=self._speeds[device])
        self._know(known)

    def round_ended(
        self, round_: int, reports: Mapping[str, Report], present: Collection[str]
    ) -> Decision | None:
        """Take in a round's importance; returns whether other plans are to hold, and why.

        Args:
            round_: Rounds done.
            reports: What everybody brought, the coordinator's own (`SERVER`) among it.
            present: Devices that are still here.
        """
        for device in reports.keys() - self._missing - {SERVER}:
            self._note(device, missed=False)
        self._missing = set()
        values = combine({n: (self._shares(n, reports), r.importance) for n, r in reports.items()})
        self._smoothing.update(values, round_, self._config.rounds)
        self._learn_speeds()
        if self.plans is None or round_ == self._config.rounds:
            return None  # nobody will run another round
        assert self._before is not None
        for device in self.profiles.keys() & self.plans.plans.keys() - set(present):
            self._gone[device] = (self.profiles[device], self.plans.plans[device])
        self._know({d: p for d, p in self.profiles.items() if d in present})
        now = self._problem
        decision = replan(self.plans, self._before, now)
        now.known.round_ended()
        now.tables.round_ended()
        if decision.reasons:
            self._before = now
        self.plans = decision.plans
        if decision.is_new:
            self._smaller = {}
        return decision if decision.reasons else None

    def prune(
        self, before: Mapping[str, Mapping[str, Pair]], reports: Mapping[str, Report]
    ) -> list[str]:
        """Take in which ranks the round has made superfluous; returns devices that have such.

        Args:
            before: Own factors at the round's start, by participant and weight.
            reports: What everybody brought.
        """
        training, found = self._config.training, []
        for name in sorted(reports.keys() - {SERVER}) if training.rank_penalty else ():
            ranks = {
                weight: rank
                for weight, pair in reports[name].pairs.items()
                if (rank := pruned_rank(before[name][weight], pair, training.rank_kept))
                < pair.a_RI.shape[-2]
            }
            if ranks:
                self._pruned[name] = self._pruned.get(name, {}) | ranks
                found.append(name)
        return found

    def _shares(self, name: str, reports: Mapping[str, Report]) -> float | dict[str, float]:
        """Return samples by weight: for a device all of its own, for the coordinator the others."""
        if name != SERVER:
            return float(reports[name].num_samples)
        by_split = [0] * (self._facts.layout.num_blocks + 1)
        for report in [own for device, own in reports.items() if device != SERVER]:
            by_split[report.split] += report.num_samples
        up_to, block_of = list(accumulate(by_split)), self._facts.block_of
        return {w: float(up_to[block_of(w)]) for w in reports[SERVER].importance}

    # ---- copies ----

    def copy(self) -> Planner:
        """Return a planner that knows the same, and goes its own way from now on."""
        found = copy(self)
        for name, value in vars(self).items():
            if name == "_smoothing":  # changed inside, as are the next two
                setattr(found, name, deepcopy(value))
            elif name in ("_rates", "_rounds"):
                setattr(found, name, {device: copy(own) for device, own in value.items()})
            elif isinstance(value, (dict, set)):
                setattr(found, name, copy(value))
        return found

    def take_back(self, before: Planning) -> None:
        """Know again what a copy of this planner knows, and no more."""
        vars(self).update(vars(before))

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return everything that a restart needs, as JSON can hold it."""
        state: dict[str, Any] = {
            "profiles": {d: asdict(p) for d, p in self.profiles.items()},
            "caps": self._caps,
            "speeds": self._speeds,
            "importance": dict(self._smoothing.values),
            "pruned": self._pruned,
            "steps": self._steps,
            "smaller": _plain(self._smaller),
        }
        if self.plans is not None and self._before is not None:
            state["plans"] = _plain(self.plans.plans)
            state["server_ranks"] = self.plans.server_ranks
            state["before"] = {
                "profiles": {d: asdict(p) for d, p in self._before.profiles.items()},
                "importance": self._before.importance,
            }
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; plans are as they were, their reasons made anew."""
        self._caps = {**state["caps"], **self._caps}  # memory that was short stays short
        measured = self.profiles.keys() - self._speeds.keys()  # by the devices, since then
        shown = {d: speed for d, speed in state["speeds"].items() if d not in measured}
        self._speeds, self._rates = {**shown, **self._speeds}, {}
        self._smoothing.load_state({n: np.array(v) for n, v in state["importance"].items()})
        # After a rewind somebody may be here who came later than the checkpoint.
        told = {d: DeviceProfile(**p) for d, p in state["profiles"].items()}
        self._know({**told, **self.profiles})
        self._pruned = {d: dict(ranks) for d, ranks in state["pruned"].items()}
        # What was too much stays too much, whatever the run goes back to.
        self._steps = {d: StepSize(*s) for d, s in state.get("steps", {}).items()} | self._steps
        self._smaller = {d: Plan(**p) for d, p in state.get("smaller", {}).items()} | self._smaller
        if "plans" in state:
            before = state["before"]
            profiles = {d: DeviceProfile(**p) for d, p in before["profiles"].items()}
            then = replace(self._problem, profiles=profiles, importance=before["importance"])
            plans = {d: then.stepped(d, Plan(**p)) for d, p in state["plans"].items()}
            ranks = dict(state["server_ranks"])
            self._before = then
            self.plans = replace(plan_all(then), plans=plans, server_ranks=ranks)
        self._take_smaller()


def _plain(plans: Mapping[str, Plan]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps({d: asdict(p) for d, p in plans.items()}))
    return found
