"""When plans are made, for whom, and what is then told: before the first round and between rounds.

What is slow is asked at the desk, and what comes of it done when the answer is there. An answer
that has been overtaken, as its device has left or offers something else by now, is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.aggregation.ledger import Report
from coordinator.config.run import ServeConfig
from coordinator.gateway.interface import Gateway
from coordinator.planning.interface import Planning
from coordinator.planning.plan_set import Decision, PlanSet, changed
from coordinator.results.events.devices import DeviceStatus
from coordinator.results.events.plans import ImportanceMeasured, PlanMade, PlanShrunk
from coordinator.results.standing.observed import DeviceOffer
from coordinator.rounds.plans.desk import Inquiry, PlanningDesk
from coordinator.rounds.run import Run
from edge_sdk.errors import (
    ConfigError,
    EdgeError,
    OutOfMemory,
    RefusedError,
    RemoteProtocolError,
    public_text,
)
from edge_sdk.lora.adapters import Pair
from edge_sdk.protocol.messages import Failure
from edge_sdk.protocol.plan import Plan
from profiler.profile import DeviceProfile

Pairs = Mapping[str, Mapping[str, Pair]]
Moved = dict[str, EdgeError | None]
"""Devices that are to run something else; beside one that cannot take part any more, why."""


class Admitting(Protocol):
    """Who may take part, as far as plans are told."""

    plans: dict[str, Plan]
    """What each device runs."""
    sessions: Counter[str]
    """The number of each device's session."""
    held_steps: dict[str, tuple[int, ...]]
    """Steps of which a device has a checkpoint of its own."""

    def part_of(self, device: str) -> AbstractContextManager[None]:
        """Let what goes wrong inside end the part of *device* alone."""

    def assign(self, device: str) -> None:
        """Tell a device what to run, if that is known by now."""

    def expel(self, device: str, error: EdgeError) -> None:
        """Let go of a device, which is told why."""


Offers = dict[str, tuple[int, DeviceProfile]]
"""What devices offer, each with the number of its session."""

# So many newcomers share one plan: it takes about as long as profiles of some hundreds, and is made
# anew where one of them has left meanwhile.
MOST_AT_ONCE = 128


@dataclass
class Offered:
    """What has come of profiles."""

    known: set[str] = field(default_factory=set)
    """Devices whose profile the planner has taken in."""
    made: PlanSet | None = None
    """The first plans, where enough devices were here."""
    devices: list[str] = field(default_factory=list)
    """For whom they were made."""
    errors: dict[str, EdgeError] = field(default_factory=dict)
    """Why devices have no plan."""


@dataclass
class Replanned:
    """What the end of a round has changed."""

    decision: Decision | None
    moved: set[str]
    """Devices that are to run something else."""
    shrunk: dict[str, str]
    """Why devices got smaller plans."""
    errors: dict[str, EdgeError]
    """Why devices have no plan."""


class PlanChanges:
    """Sees to it that each device has the plan that is meant for it."""

    def __init__(
        self,
        config: ServeConfig,
        gateway: Gateway,
        run: Run,
        admission: Admitting,
        desk: PlanningDesk,
    ) -> None:
        self._config, self._gateway, self._run = config, gateway, run
        self._admission, self._desk = admission, desk
        desk.part_of = admission.part_of
        self._offers: Offers = {}
        """What devices offer for which nothing is planned yet."""
        self._alone: set[str] = set()
        """Those of them that share no plan with others: one for all was too much, or failed."""

    # ---- devices come ----

    def profiled(self, device: str, profile: DeviceProfile) -> None:
        """Note what a device offers, if it was asked; of several profiles the last one counts."""
        if self._desk.is_fixed:
            raise RemoteProtocolError("Profiled, which nobody asked for: the plans are fixed")
        self._offers[device] = self._admission.sessions[device], profile

    def plan_next(self) -> None:
        """Plan for devices that have told what they offer; who comes meanwhile waits a turn.

        First plans are made as soon as enough devices are here, so that these come one by one.
        """
        self._desk.pump()
        for device, (session, _) in list(self._offers.items()):
            if session != self._admission.sessions[device]:
                del self._offers[device]
        if not self._offers or self._desk.is_busy:
            return
        self._plan({device: self._offers.pop(device) for device in self._next()})
        self._alone &= self._offers.keys()
        if self._offers and not self._desk.is_busy:
            self._gateway.wake()

    def _next(self) -> list[str]:
        """Return for whom is planned now: who has waited longest, and who may share its plan."""
        first = next(iter(self._offers))
        if self._desk.plans is None or first in self._alone:
            return [first]
        return [device for device in self._offers if device not in self._alone][:MOST_AT_ONCE]

    def _plan(self, offers: Offers) -> None:
        """Plan for devices at once, or with the others once enough of them are here."""
        present, least = self._gateway.devices(), self._config.min_devices
        ready = offers.keys() & self._run.state.ready.keys()

        def think(planner: Planning) -> Offered:
            return _consider(planner, offers, ready, present, least)

        def is_as_asked(device: str) -> bool:
            is_same = offers[device][0] == self._admission.sessions[device]
            return is_same and device not in self._offers

        def can_share(found: Offered | None) -> bool:
            return found is not None and not any(
                isinstance(error, ConfigError) for error in found.errors.values()
            )

        def fits(found: Offered | None) -> bool:
            devices = set() if found is None else set(found.devices)
            return (
                (len(offers) == 1 or can_share(found))
                and all(map(is_as_asked, offers))
                and ready == offers.keys() & self._run.state.ready.keys()
                and devices <= set(self._gateway.devices())
            )

        def again() -> None:
            kept = {d: offer for d, offer in offers.items() if is_as_asked(d)}
            if len(kept) == len(offers):  # nobody has left: of them some may have a plan alone
                self._alone |= kept.keys()
            if kept:
                self._offers = {**kept, **self._offers}
                self._gateway.wake()

        def told(found: Offered) -> None:
            for device, (_, profile) in offers.items():
                with self._admission.part_of(device):
                    self._take_offer(device, profile, device in ready, found)

        who = tuple(offers)
        self._desk.ask(Inquiry(think=think, then=told, devices=who, fits=fits, otherwise=again))

    def _take_offer(
        self, device: str, profile: DeviceProfile, is_ready: bool, found: Offered
    ) -> None:
        watcher, error = self._run.watcher, found.errors.get(device)
        if device in found.known:
            what = "another speed" if is_ready else "measured"
            watcher.see(DeviceOffer(device, what, profile))
        if isinstance(error, ConfigError) and self._desk.plans is not None:
            status = f"waits: no plan is possible with it: {error}"
            watcher.see(DeviceStatus(device, status, is_delay=True))
        elif error is not None:
            raise error
        elif found.made is not None:
            self._first_plans(found.made, found.devices)
        elif not is_ready:
            self._assign(device)

    def _assign(self, device: str) -> None:
        try:
            self._admission.assign(device)
        except ConfigError as error:
            status = f"waits: no plan is possible with it: {error}"
            self._run.watcher.see(DeviceStatus(device, status, is_delay=True))
        else:
            if device in self._admission.plans:
                self._run.watcher.see(DeviceStatus(device, "fetching its blocks"))

    def _first_plans(self, made: PlanSet, devices: list[str]) -> None:
        self._run.watcher.see(PlanMade(self._run.state.round, made, ["first plans"], {}))
        for name in devices:
            with self._admission.part_of(name):
                if name in made.refused:
                    self._admission.expel(name, RefusedError(made.refused[name]))
                else:
                    self._assign(name)

    # ---- rounds go on, and end ----

    def stepped(self, device: str, num_tokens: int, compute_s: float) -> None:
        """Take in what a device computed in a step, in tokens and seconds."""
        self._desk.stepped(device, num_tokens, compute_s)

    def plan_again(
        self,
        reports: Mapping[str, Report],
        before: Pairs | None,
        then: Callable[[Moved], None],
    ) -> None:
        """Let the planner see a round; *then* gets the devices that are to run something else.

        Args:
            reports: What everybody brought, the coordinator among them.
            before: Own factors at the round's start, by participant and weight; None where no
                ranks are cut off.
            then: Called in the loop's thread, with these devices, sorted.
        """
        state, present = self._run.state, self._gateway.devices()
        round_, sessions = state.round, dict(self._admission.sessions)

        def think(planner: Planning) -> Replanned:
            old = {} if planner.plans is None else planner.plans.plans
            moved = set() if before is None else set(planner.prune(before, reports))
            decision = planner.round_ended(round_, reports, present)
            if decision is not None:
                moved = set(changed(old, decision.plans.plans))
            shrunk = planner.take_shrunk()
            return Replanned(decision, moved, shrunk, _settle(planner, moved | shrunk.keys()))

        def told(found: Replanned) -> None:
            if found.decision is not None:
                made, why = found.decision.plans, found.decision.reasons
                self._run.watcher.see(
                    PlanMade(round_, made, why, self._desk.importance, found.moved)
                )
            self._tell_shrunk(found.shrunk)
            moved = found.moved | (found.shrunk.keys() & state.ready.keys())
            if round_ == state.total_rounds:
                moved = set()
            now = self._admission.sessions
            same = [name for name in sorted(moved) if sessions.get(name, 0) == now[name]]
            then({name: found.errors.get(name) for name in same})

        self._desk.ask(Inquiry(think=think, then=told))

    def _tell_shrunk(self, shrunk: Mapping[str, str]) -> None:
        """Show who got a smaller plan, and why."""
        for device, why in sorted(shrunk.items()):
            plan, plans = self._desk.plan_in_force(device), self._admission.plans
            shown = plans if plan is None else {**plans, device: plan}
            self._run.watcher.see(PlanShrunk(self._run.state.round, device, why, shown))

    def tell_importance(self) -> None:
        """Show how much each weight matters by now, where that is measured."""
        if importance := self._desk.importance:
            self._run.watcher.see(ImportanceMeasured(self._run.state.round, dict(importance)))

    def move(self, device: str, error: EdgeError | None = None) -> None:
        """Let a device run its new plan; the next round waits until it is ready again.

        Args:
            device: Which.
            error: Why it has none, and is to leave.
        """
        admission = self._admission
        with admission.part_of(device):
            self._run.wait_for(device)
            admission.held_steps[device] = ()
            if error is not None:
                raise error
            admission.assign(device)
            self._run.watcher.see(DeviceStatus(device, "a new plan"))

    def expel_refused(self) -> None:
        """Let go of ready devices that the plans in force leave out, before their blocks move."""
        plans = self._desk.plans
        if plans is None:
            return
        for device in sorted(self._run.state.ready):
            if device not in plans.plans:
                reason = plans.refused.get(device, "no plan takes this device in any more")
                self._admission.expel(device, RefusedError(reason))

    # ---- plans of before ----

    def rewind(self, state: Mapping[str, object], then: Callable[[], None]) -> None:
        """Let the plans of a checkpoint hold again, and move devices that run others.

        Args:
            state: What the planner knew then.
            then: Called in the loop's thread before anybody moves.
        """
        devices = sorted(self._admission.plans)

        def think(planner: Planning) -> dict[str, EdgeError]:
            planner.load_state(state)
            return _settle(planner, devices)

        def told(errors: dict[str, EdgeError]) -> None:
            then()
            self._move_outdated(errors)

        self._desk.ask(Inquiry(think=think, then=told))

    def _move_outdated(self, errors: Mapping[str, EdgeError]) -> None:
        """Move the devices that run another plan than the planner has for them."""
        for device in sorted(self._run.state.ready):
            with self._admission.part_of(device):
                if device in errors:
                    raise errors[device]
                if self._desk.plan_in_force(device) != self._admission.plans[device]:
                    self.move(device)

    # ---- a plan was too much ----

    def failed(self, device: str, message: Failure) -> None:
        """Let go of a device that could not go on; one that ran out of memory gets less to do."""
        run = self._run
        reason = public_text(f"{message.error}: {message.text}")
        run.lose(device, reason)
        if message.error != OutOfMemory.__name__:
            return
        run.conduct.finished(device)  # with less to do it begins anew

        def think(planner: Planning) -> tuple[OutOfMemory | None, dict[str, str]]:
            try:
                planner.ran_out_of_memory(device)
            except OutOfMemory as error:
                return error, planner.take_shrunk()
            return None, planner.take_shrunk()

        def told(found: tuple[OutOfMemory | None, dict[str, str]]) -> None:
            error, shrunk = found
            if error is not None:
                self._admission.expel(device, error)
            self._tell_shrunk(shrunk)

        self._desk.ask(Inquiry(think=think, then=told, devices=(device,)))


def _settle(planner: Planning, devices: Iterable[str]) -> dict[str, EdgeError]:
    """Let each of *devices* have a plan that it can hold; return why some have none."""
    errors: dict[str, EdgeError] = {}
    for device in sorted(devices):
        try:
            planner.plan(device)
        except EdgeError as error:
            errors[device] = error
    return errors


def _consider(
    planner: Planning, offers: Offers, ready: Set[str], present: list[str], least: int
) -> Offered:
    """Let the planner take in profiles, and plan for those of *offers* that are not *ready*.

    Args:
        planner: Whom to ask.
        offers: Whose profiles; several only once there are plans.
        ready: Devices that take part: what their change means is decided between rounds.
        present: Devices that are here.
        least: So many of them make the first plans.
    """
    found = Offered()
    for device, (_, profile) in offers.items():
        try:
            planner.profiled(device, profile)
            found.known.add(device)
        except EdgeError as error:
            found.errors[device] = error
    for device in [d for d in offers if d in found.known and d not in ready]:
        try:
            if planner.plans is not None:
                planner.plan(device)
                continue
            found.devices = [d for d in present if planner.is_known(d)]
            if len(found.devices) >= least:
                found.made = planner.begin(found.devices)
        except EdgeError as error:
            found.errors[device] = error
    return found
