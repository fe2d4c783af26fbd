"""Planning takes long, and nobody who greets meanwhile waits for more than one plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Event, Joined
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from coordinator.rounds.loop import Coordinator
from edge_sdk.protocol.messages import PlanAssigned, Profiled, Refused, Welcome
from profiler.profile import DeviceProfile
from tests.coordinator.rounds.plans.planned import planned
from tests.coordinator.rounds.test_any_message import (
    PROFILE,
    Listed,
    Now,
    Play,
    arriving,
    coming,
    told,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServeConfig, ServerModel]:
    """A run whose plans are made from profiles."""
    return planned(tmp_path_factory.mktemp("planned"), min_devices=2)


def test_forty_profiles_delay_no_greeting(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty profiles at once are one plan, made when the others' messages are answered."""
    config, model = served
    gateway = Listed()
    folder = RunFolder.create(tmp_path, "run")
    coordinator = Coordinator(config, model, folder, gateway, Watchers(), "run-1", pool=Now())
    play, planned, at_plan = Play(coordinator, gateway, config.labels), list[str](), list[bool]()
    profiled = coordinator.planner.profiled

    def watched(device: str, profile: DeviceProfile) -> None:
        planned.append(device)
        at_plan.append(gateway.last("b", Welcome) is not None)
        profiled(device, profile)

    monkeypatch.setattr(coordinator.planner, "profiled", watched)

    def script() -> Iterator[list[Event]]:
        gateway.present |= {"m", "b"}
        yield coming("m")
        stamp = gateway.last("m", Welcome).stamp
        flood = [
            arriving("m", Profiled(stamp=stamp, profile=replace(PROFILE, flops_per_s=n)))
            for n in range(1, 25)
        ]
        yield [*[event for events in flood for event in events], *coming("b")]
        assert planned == ["m"]
        assert at_plan == [True]
        yield []
        assert planned == ["m"]
        assert not told(gateway, Refused)
        yield [event for events in flood[:16] for event in events]
        assert "more than 24 Profiled" in told(gateway, Refused)[-1]
        yield from play.come("c")
        yield []
        yield arriving("b", Profiled(stamp=gateway.last("b", Welcome).stamp, profile=PROFILE))
        yield []
        assert gateway.last("b", PlanAssigned) is not None
        coordinator.stop()
        while True:
            yield []

    gateway.script = script()
    assert coordinator.serve() == "paused"


def test_a_session_that_is_over_is_planned_for_no_more(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device offered before it came anew does not count."""
    config, model = served
    gateway, planned = Listed(), list[str]()
    folder = RunFolder.create(tmp_path, "run")
    coordinator = Coordinator(config, model, folder, gateway, Watchers(), "run-1", pool=Now())
    monkeypatch.setattr(coordinator.planner, "profiled", lambda device, _: planned.append(device))

    def script() -> Iterator[list[Event]]:
        gateway.present.add("m")
        yield coming("m")
        stamp = gateway.last("m", Welcome).stamp
        yield [*arriving("m", Profiled(stamp=stamp, profile=PROFILE)), Joined("m", "2" * 32)]
        yield []
        coordinator.stop()
        while True:
            yield []

    gateway.script = script()
    assert coordinator.serve() == "paused"
    assert planned == []
