"""What a run needs of its planning: the `Planning` interface, as `run_planner.py` has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from coordinator.aggregation.ledger import Report
from coordinator.planning.plan_set import Decision, PlanSet
from edge_sdk.lora.adapters import Pair
from edge_sdk.protocol.plan import Plan
from profiler.profile import DeviceProfile


class InForce(Protocol):
    """The plans in force, and what little of them changes at once."""

    @property
    def plans(self) -> PlanSet | None:
        """The plans themselves; None before the first, and for a fixed config."""

    @property
    def is_fixed(self) -> bool:
        """Whether the config leaves nothing to plan, so that nobody need be measured."""

    @property
    def importance(self) -> Mapping[str, float]:
        """Smoothed global importance by weight; empty before the first measurement."""

    @property
    def first(self) -> int | None:
        """First block of the coordinator; None where the config's holds."""

    @property
    def server_ranks(self) -> dict[str, int] | None:
        """Ranks of the coordinator's own adapters; None where the config's hold."""

    def is_known(self, device: str) -> bool:
        """Return whether a device has told what it offers."""

    def plan_in_force(self, device: str) -> Plan | None:
        """Return the plan that a device has; None where nothing is planned for it."""

    def codec(self, device: str, plan: Plan) -> str:
        """Return how a device's hidden states and gradients travel under its plan."""

    def missed(self, device: str) -> None:
        """Take note that a device missed a round; one that keeps missing gets a smaller plan."""

    def stepped(self, device: str, num_tokens: int, compute_s: float) -> None:
        """Take in what a device computed in a step, in tokens and seconds."""

    def copy(self) -> Planning:
        """Return a planner that knows the same, and goes its own way from now on."""


class Planning(InForce, Protocol):
    """Who runs what, from the first device to the last round."""

    # ---- devices come ----

    def profiled(self, device: str, profile: DeviceProfile) -> None:
        """Take in what a device offers.

        Raises:
            RefusedError: that cannot be true, or is too little for any plan.
            ConfigError: the coordinator is too small even for this device alone.
        """

    def begin(self, devices: Collection[str]) -> PlanSet:
        """Make the first plans, for *devices* that have all told what they offer.

        Raises:
            ConfigError: the coordinator is too small for what they leave to it.
        """

    def plan(self, device: str) -> Plan | None:
        """Return the plan of a device; None where it has to wait for the others' profiles.

        Raises:
            RefusedError: it cannot take part.
            ConfigError: the config asks for what nobody can do.
        """

    def ran_out_of_memory(self, device: str) -> None:
        """Plan less for a device that could not hold its plan.

        Raises:
            OutOfMemory: there is no smaller plan; the one that it has stays.
        """

    def take_shrunk(self) -> dict[str, str]:
        """Return who got a smaller plan since the last call, each with why and what it lost."""

    # ---- rounds ----

    def prune(
        self, before: Mapping[str, Mapping[str, Pair]], reports: Mapping[str, Report]
    ) -> list[str]:
        """Take in which ranks a round has made superfluous; return devices that have such."""

    def round_ended(
        self, round_: int, reports: Mapping[str, Report], present: Collection[str]
    ) -> Decision | None:
        """Take in a round's importance; return whether other plans are to hold, and why."""

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return everything that a restart needs, as JSON can hold it."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""

    def take_back(self, before: Planning) -> None:
        """Know again what a copy of this planner knows, and no more."""
