"""Somebody thinks about plans for long: others are answered, and what is overtaken is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Event, Joined, Left
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from coordinator.rounds.loop import Coordinator
from coordinator.rounds.plans.desk import Inquiry
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import (
    Failure,
    PartData,
    PartRequest,
    PlanAssigned,
    Profiled,
    Ready,
    Refused,
    Stamp,
    Welcome,
)
from edge_sdk.protocol.plan import Plan
from profiler.profile import DeviceProfile
from tests.coordinator.rounds.plans.planned import planned
from tests.coordinator.rounds.test_any_message import (
    PLANNING,
    PROFILE,
    Listed,
    Now,
    Play,
    arriving,
    coming,
    told,
)
from tests.e2e.cluster import PATIENCE_S

Script = Iterator[list[Event]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServeConfig, ServerModel]:
    """A run whose plans are made from profiles."""
    return planned(tmp_path_factory.mktemp("planned"), min_devices=1)


class Woken(Listed):
    """A gateway that lets its script wait until another thread has something."""

    def __init__(self) -> None:
        super().__init__()
        self._woken = threading.Event()

    def wake(self) -> None:
        """Let the script go on."""
        self._woken.set()

    def until(self, is_so: Callable[[], object]) -> Script:
        """Let turns pass until something is so."""
        while not is_so():
            self._woken.clear()
            yield []
            assert is_so() or self._woken.wait(PATIENCE_S)


class Held:
    """A run whose planner thinks about profiles only when it may."""

    def __init__(
        self, served: tuple[ServeConfig, ServerModel], folder: Path, min_devices: int = 1
    ) -> None:
        config, model = served
        self.gateway, self.go, self.thinks = Woken(), threading.Event(), threading.Event()
        self.planned: list[tuple[str, float | None, int]] = []
        self.coordinator = Coordinator(
            replace(config, min_devices=min_devices),
            model,
            RunFolder.create(folder, "run"),
            self.gateway,
            Watchers(),
            "run-1",
        )
        self.planner = self.coordinator.planner
        self.play = Play(self.coordinator, self.gateway, config.labels)
        self._profiled = self.planner.profiled
        self.planner.profiled = self._think  # type: ignore[method-assign]

    def _think(self, device: str, profile: DeviceProfile) -> None:
        self.planned.append((device, profile.flops_per_s, threading.get_ident()))
        self.thinks.set()
        assert self.go.wait(PATIENCE_S)
        self._profiled(device, profile)

    def offer(self, device: str, profile: DeviceProfile = PROFILE) -> list[Event]:
        """What the gateway makes of a profile."""
        stamp = self.gateway.last(device, Welcome).stamp
        return arriving(device, Profiled(stamp=stamp, profile=profile))

    def serve(self, script: Script) -> None:
        """Serve *script*, then stop."""

        def whole() -> Script:
            yield from script
            self.coordinator.stop()
            while True:
                yield []

        self.gateway.script = whole()
        assert self.coordinator.serve() == "paused"


def test_a_slow_planner_delays_nobody(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path
) -> None:
    """While it thinks, others are greeted, served parts and refused; then the plan is told."""
    run = Held(served, tmp_path)
    gateway, part = run.gateway, served[1].parts["front"].sha256

    def script() -> Script:
        yield from run.play.come("m")
        yield []
        assert run.thinks.wait(PATIENCE_S)
        gateway.present |= {"b", "x"}
        yield [*coming("b"), Joined("x", "1" * 32)]
        assert gateway.last("b", Welcome) is not None
        yield arriving("b", PartRequest(stamp=Stamp(), sha256=part, offset=0))
        yield from gateway.until(lambda: gateway.last("b", PartData))
        yield arriving("x", Ready(stamp=Stamp(), vocab_size=1, num_samples=1, held_steps=()))
        assert "Ready before Hello" in told(gateway, Failure)[-1]
        yield run.offer("b")
        assert gateway.last("m", PlanAssigned) is None
        assert not run.go.is_set()
        run.go.set()
        yield from gateway.until(lambda: gateway.last("m", PlanAssigned))
        yield from gateway.until(lambda: gateway.last("b", PlanAssigned))

    run.serve(script())
    assert [device for device, *_ in run.planned] == ["m", "b"]
    assert threading.get_ident() not in {thread for *_, thread in run.planned}


def test_a_device_that_has_left_is_planned_for_no_more(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path
) -> None:
    """What was thought about for a session that is over is dropped; the next one gets its plan."""
    run = Held(served, tmp_path)

    def script() -> Script:
        yield from run.play.come("m")
        yield []
        assert run.thinks.wait(PATIENCE_S)
        yield coming("m")
        run.go.set()
        yield from run.gateway.until(lambda: not run.coordinator._desk.is_busy)
        assert run.planner.profiles == {}
        assert run.planner.plans is None
        assert run.gateway.last("m", PlanAssigned) is None
        yield run.offer("m")
        yield from run.gateway.until(lambda: run.gateway.last("m", PlanAssigned))

    run.serve(script())


def test_the_newest_profile_counts(served: tuple[ServeConfig, ServerModel], tmp_path: Path) -> None:
    """A plan from a profile that has been replaced meanwhile is dropped and made anew."""
    run = Held(served, tmp_path)

    def script() -> Script:
        yield from run.play.come("m")
        yield []
        assert run.thinks.wait(PATIENCE_S)
        yield run.offer("m", replace(PROFILE, flops_per_s=7e9))
        run.go.set()
        yield from run.gateway.until(lambda: run.gateway.last("m", PlanAssigned))
        assert run.planner.profiles["m"].flops_per_s == 7e9

    run.serve(script())
    assert [speed for _, speed, _ in run.planned] == [PROFILE.flops_per_s, 7e9]
    assert sum(isinstance(m, PlanAssigned) for _, m in run.gateway.sent) == 1


def test_first_plans_are_made_for_those_who_are_here(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path
) -> None:
    """A device that leaves while the first plans are made is in none; they wait for enough."""
    run = Held(served, tmp_path, min_devices=2)
    gateway = run.gateway

    def script() -> Script:
        run.go.set()
        yield from run.play.come("a")
        yield from gateway.until(lambda: run.planner.is_known("a"))
        run.go.clear()
        run.thinks.clear()
        yield from run.play.come("b")
        yield []
        assert run.thinks.wait(PATIENCE_S)
        gateway.present.discard("a")
        yield [Left("a", "gone")]
        run.go.set()
        yield from gateway.until(lambda: len(run.planned) == 3)
        yield from gateway.until(lambda: not run.coordinator._desk.is_busy)
        assert run.planner.plans is None
        yield from run.play.come("a")
        yield from gateway.until(lambda: gateway.last("a", PlanAssigned))
        assert gateway.last("b", PlanAssigned) is not None

    run.serve(script())
    assert [device for device, *_ in run.planned] == ["a", "b", "b", "a"]


def test_who_comes_together_is_planned_for_together(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices that offer something while somebody thinks share the next plan, but those that left.

    One of them is refused; one leaves and comes again while the others are thought about.
    """
    run = Held(served, tmp_path)
    gateway, asked = run.gateway, list[tuple[str, ...]]()
    ask = run.coordinator._desk.ask

    def watched(question: Inquiry) -> None:
        asked.append(question.devices)
        ask(question)

    monkeypatch.setattr(run.coordinator._desk, "ask", watched)

    def script() -> Script:
        run.go.set()
        yield from run.play.come("m")
        yield from gateway.until(lambda: gateway.last("m", PlanAssigned))
        run.go.clear()
        run.thinks.clear()
        for name in "abcd":
            gateway.present.add(name)
            yield coming(name)
        tiny = replace(PROFILE, memory_bytes=1.0)
        yield [e for n in "abd" for e in run.offer(n)] + run.offer("c", tiny)
        yield []
        assert run.thinks.wait(PATIENCE_S)
        yield coming("a")
        run.go.set()
        yield from gateway.until(lambda: gateway.last("d", PlanAssigned))
        assert gateway.last("b", PlanAssigned) is not None
        assert "its budget is 0.0 MiB" in told(gateway, Refused)[-1]
        assert gateway.last("a", PlanAssigned) is None
        yield run.offer("a")
        yield from gateway.until(lambda: gateway.last("a", PlanAssigned))

    run.serve(script())
    assert asked == [("m",), ("a", "b", "d", "c"), ("b", "d", "c"), ("a",)]


def test_of_those_who_come_together_some_may_have_room(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the coordinator is too small for all of them, each is tried on its own, in its turn."""
    run = Held(served, tmp_path)
    gateway, plan = run.gateway, run.planner.plan

    def too_small(device: str) -> Plan | None:
        if run.planner.profiles.keys() >= {"a", "b"}:
            raise ConfigError("the coordinator is too small")
        return plan(device)

    monkeypatch.setattr(run.planner, "plan", too_small)

    def script() -> Script:
        run.go.set()
        yield from run.play.come("m")
        yield from gateway.until(lambda: gateway.last("m", PlanAssigned))
        run.go.clear()
        for name in "ab":
            gateway.present.add(name)
            yield coming(name)
        yield run.offer("a") + run.offer("b")
        run.go.set()
        yield from gateway.until(lambda: gateway.last("a", PlanAssigned))
        yield from gateway.until(lambda: len(run.planned) == 5)
        yield from gateway.until(lambda: not run.coordinator._desk.is_busy)

    run.serve(script())
    assert gateway.last("b", PlanAssigned) is None
    assert [device for device, *_ in run.planned] == ["m", "a", "b", "a", "b"]


def test_what_nobody_foresaw_is_one_devices_matter(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path
) -> None:
    """A profile that breaks the planner ends its device's part, not that of who came with it."""
    run = Held(served, tmp_path)
    gateway, think = run.gateway, run._profiled

    def broken(device: str, profile: DeviceProfile) -> None:
        if device == "a":
            raise KeyError("unforeseen")
        think(device, profile)

    run._profiled = broken

    def script() -> Script:
        run.go.set()
        yield from run.play.come("m")
        yield from gateway.until(lambda: gateway.last("m", PlanAssigned))
        for name in "ab":
            gateway.present.add(name)
            yield coming(name)
        yield run.offer("a") + run.offer("b")
        yield from gateway.until(lambda: gateway.last("b", PlanAssigned))

    run.serve(script())
    assert gateway.last("a", PlanAssigned) is None
    assert [device for device, *_ in run.planned] == ["m", "a", "a", "b"]


def test_planning_that_fails_ends_the_run_in_the_same_words(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path
) -> None:
    """A setting that no plan can keep to is named, wherever plans are made."""
    config, model = served
    tiny = replace(PLANNING, ranks="rngwp", adapter_bytes=1.0)
    small = replace(config, planning=tiny)
    said = []
    for name, pool in (("here", Now()), ("there", None)):
        gateway = Woken()
        folder = RunFolder.create(tmp_path, name)
        planned = ServerModel(small, model._cache)
        coordinator = Coordinator(small, planned, folder, gateway, Watchers(), "run-1", pool=pool)
        play = Play(coordinator, gateway, config.labels)

        def script(play: Play = play, gateway: Woken = gateway) -> Script:
            yield from play.come("m")
            yield from gateway.until(lambda: False)

        gateway.script = script()
        with pytest.raises(ConfigError) as raised:
            coordinator.serve()
        said.append(str(raised.value))

    assert said[0] == said[1]
    assert said[0]
