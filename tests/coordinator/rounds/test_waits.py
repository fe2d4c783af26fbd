"""A run says whom it waits for, and goes on without those who keep it waiting for too long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.config.run import ServeConfig
from coordinator.gateway.residuals import Residuals
from coordinator.results.events.event import RunEvent
from coordinator.results.metrics import Reporting
from coordinator.rounds.progress import Waits
from coordinator.rounds.run import RESTS, Run
from coordinator.rounds.state import Phase
from edge_sdk.errors import PeerGone
from tests.coordinator.rounds.test_state import make_state, member


class Links:
    """A gateway that knows who has a session, and how much has moved in it."""

    def __init__(self) -> None:
        self.moved: dict[str, int] = {}
        self.forgotten: dict[str, str] = {}

    def devices(self) -> list[str]:
        """Who has a session."""
        return sorted(self.moved)

    def stats(self, device: str) -> Any:
        """What has moved."""
        if device not in self.moved:
            raise PeerGone(device)
        return SimpleNamespace(num_moved=self.moved[device])

    def forget(self, device: str, reason: str) -> None:
        """End a session."""
        del self.moved[device]
        self.forgotten[device] = reason


class Scene:
    """A run of devices a, b and c without a network, and what it says."""

    def __init__(self, **settings: Any) -> None:
        self.notes: list[str] = []
        state = make_state(min_devices=settings.get("min_devices", 3))
        round_start: Any = SimpleNamespace(forget=lambda *_: None)
        self.run = Run("r", state, round_start, Reporting(self, False), Residuals(0, None))
        self.links, self.missed, self.now_s = Links(), list[str](), 0.0
        planner: Any = SimpleNamespace(missed=self.missed.append)
        links: Any = self.links
        self.waits = Waits(ServeConfig(model="m", **settings), self.run, links, planner)

    def see(self, event: RunEvent) -> None:
        """Keep what a person reads."""
        self.notes += [event.text] if event.text else []

    def join(self, *names: str) -> None:
        """Let devices join."""
        for name in names:
            self.links.moved[name] = 0
            self.run.join(member(name), 8)

    def arrive(self, *names: str) -> None:
        """Let members do their part of a wave."""
        for name in names:
            self.links.moved[name] += 1
            self.run.state.arrive(name)

    def wait(self, seconds: float, *, is_computing: bool = False) -> None:
        """Look twice a second for so long."""
        for _ in range(round(2 * seconds)):
            self.now_s += 0.5
            self.waits.look(self.now_s, is_computing=is_computing)


def test_a_hung_device_is_named_and_lost_and_the_others_go_on() -> None:
    """Its session is forgotten, the planner hears of it, and the wave is complete without it."""
    scene = Scene(min_devices=2)
    scene.join("a", "b", "c")
    scene.run.start_round()
    scene.notes.clear()
    scene.arrive("a", "c")
    scene.wait(121)

    assert scene.notes == [
        "step 0: waiting 15 s for b",
        "step 0: waiting 30 s for b",
        "step 0: waiting 60 s for b",
        "b: left: hangs: no progress for 120 s, although its link lives",
    ]
    assert list(scene.links.forgotten) == ["b"]
    assert scene.missed == ["b"]
    assert not scene.run.must_rewind
    assert scene.run.state.arrived == set(scene.run.state.members) == {"a", "c"}


def test_nobody_is_waited_for_while_the_coordinator_computes() -> None:
    """However long that takes."""
    scene = Scene(min_devices=2)
    scene.join("a", "b")
    scene.run.start_round()
    scene.notes.clear()
    scene.wait(1000, is_computing=True)

    assert scene.notes == []


def test_a_round_that_lacks_devices_says_what_has_become_of_them() -> None:
    """How many are missing, who left when and why, and who is on its way."""
    scene = Scene()
    scene.join("a", "b")
    scene.links.moved["c"] = 0
    scene.wait(5)
    scene.run.lose("b", "silent for 120 s")
    del scene.links.moved["b"]
    scene.notes.clear()
    scene.wait(31)

    assert scene.notes == [
        "round 1 waits for 2 more devices: 1 of 3 is here; b left 15 s ago: silent for 120 s; "
        "c has been on its way for 20 s",
        "round 1 waits for 2 more devices: 1 of 3 is here; b left 30 s ago: silent for 120 s; "
        "c has been on its way for 35 s",
    ]


def test_who_is_awaited_is_given_up_after_the_patience() -> None:
    """One that comes back in time ends the wait, one that moves bytes prolongs it."""
    scene = Scene(min_devices=1)
    scene.run.state.wait_for({"a", "b"})
    scene.join("a")
    scene.wait(100)
    scene.links.moved["b"] = 1
    scene.wait(115)
    before = set(scene.run.state.awaited)
    scene.wait(10)

    assert before == {"b"}
    assert scene.run.state.awaited == set()
    assert scene.notes[-1] == "going on without b: not back yet"


@pytest.mark.parametrize(("least", "left"), [(2, {"a", "c"}), (3, {"a", "b", "c"})])
def test_a_deadline_drops_who_is_late_where_enough_are_left(least: int, left: set[str]) -> None:
    """It stays ready, for the next round, and the planner hears of it."""
    scene = Scene(min_devices=least, round_deadline_s=60.0)
    scene.join("a", "b", "c")
    scene.run.start_round()
    scene.arrive("a", "c")
    scene.wait(59)
    before = set(scene.run.state.members)
    scene.wait(2)

    assert before == {"a", "b", "c"}
    assert scene.run.state.members.keys() == left
    assert scene.run.state.ready.keys() == {"a", "b", "c"}
    assert scene.run.state.phase is Phase.TRAINING
    assert scene.missed == sorted({"a", "b", "c"} - left)
    assert scene.run.cut_off.devices == {"a", "b", "c"} - left


def test_after_a_deadline_a_step_waits_for_a_moment() -> None:
    """Who answers within a second is no straggler, however late the round is."""
    scene = Scene(min_devices=2, round_deadline_s=5.0)
    scene.join("a", "b", "c")
    scene.run.start_round()
    scene.wait(6, is_computing=True)
    scene.arrive("a", "c")
    scene.wait(1)

    assert scene.run.state.members.keys() == {"a", "b", "c"}


def test_a_device_that_sits_out_is_told_of() -> None:
    """Lost twice in a row, it sits out the next round where enough others are ready."""
    scene = Scene(min_devices=2)
    for _ in range(2):
        scene.join("a", "b", "c")
        scene.run.start_round()
        scene.run.lose("c", "silent for 120 s")
        scene.run.state.restore(scene.run.state.round, 0, scene.run.state.attempt)
    scene.join("c")
    scene.run.start_round()

    assert scene.notes[-1] == f"c: {RESTS}"
    assert scene.run.state.members.keys() == {"a", "b"}
