"""When a round is saved on its way: as often as wanted, as seldom as it costs, never by halves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.gateway.residuals import Residuals
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundHeld, RoundUnsaved
from coordinator.results.metrics import Reporting
from coordinator.rounds.marking import MARK_PATIENCE_S, MOST_SHARE, Marking
from coordinator.rounds.pausing import PAUSE_PATIENCE_S, STEP_PATIENCE_S, Pausing
from coordinator.rounds.run import Run
from coordinator.rounds.state import Member, RunState
from coordinator.steering.wishes import Wish


class Scene:
    """A run of devices a and b between two steps of its first round, and what it says."""

    def __init__(self, *, marks: bool = True, is_local: bool = False, min_devices: int = 2) -> None:
        self.events: list[RunEvent] = []
        state = RunState(2, 30, min_devices, labels_on_device=False)
        round_start: Any = SimpleNamespace(forget=lambda *_: None)
        self.run = Run("r", state, round_start, Reporting(self, False), Residuals(0, None))
        for name in "ab":
            state.join(Member(name, 1, 4, 1, is_local=is_local and name == "b", marks=marks))
        state.start_round()
        state.step = 5

    def see(self, event: RunEvent) -> None:
        """Keep what is told."""
        self.events.append(event)

    def save(self, *devices: str) -> None:
        """Let devices have saved themselves."""
        for device in devices:
            self.run.savers.take(device, self.run.state.step)

    def mark(self, marking: Marking, now_s: float, seconds: float) -> None:
        """Save the round, which takes so long."""
        marking.begin(now_s)
        self.save("a", "b")
        assert marking.is_over(now_s)
        assert marking.end()
        self.run.saved()
        marking.saved(now_s + seconds)
        self.run.state.step += 1


def test_a_round_is_saved_as_often_as_wanted() -> None:
    """So many seconds after its start and after the last time; not where nothing was done since."""
    scene = Scene()
    marking = Marking(scene.run, 60.0)

    due = [marking.is_due(now_s) for now_s in (0.0, 59.0, 60.0)]
    scene.mark(marking, 60.0, 0.1)

    assert due == [False, False, True]
    assert [marking.is_due(now_s) for now_s in (119.0, 120.2)] == [False, True]
    scene.run.state.saved()
    assert not marking.is_due(500.0)


def test_saving_takes_a_small_part_of_the_time() -> None:
    """What takes 3 s is done every 150 s; with 0 after each step, whatever it takes."""
    scene = Scene()
    marking, always = Marking(scene.run, 60.0), Marking(scene.run, 0.0)
    marking.is_due(0.0)

    scene.mark(marking, 60.0, 3.0)

    least_s = 3.0 / MOST_SHARE
    assert [marking.is_due(63.0 + s) for s in (least_s - 1.0, least_s)] == [False, True]
    assert always.is_due(0.0)


@pytest.mark.parametrize("scene", [Scene(marks=False), Scene(is_local=True)], ids=["old", "local"])
def test_who_cannot_save_itself_at_a_step_is_not_asked(scene: Scene) -> None:
    """With a device of an earlier release, or one that trains alone, no round is saved."""
    marking = Marking(scene.run, 0.0)

    assert not marking.is_due(0.0)


def test_half_a_round_is_not_saved() -> None:
    """Who does not answer in time is named, the round goes on, and is saved no more."""
    scene = Scene()
    marking = Marking(scene.run, 0.0)
    marking.is_due(0.0)
    marking.begin(0.0)
    scene.save("a")

    over = [marking.is_over(now_s) for now_s in (0.0, MARK_PATIENCE_S)]

    assert over == [False, True]
    assert not marking.end()
    assert scene.events == [RoundUnsaved(0, 5, ["b"])]
    assert not marking.is_due(100.0)
    assert scene.run.state.members.keys() == {"a", "b"}


def test_a_round_is_held_for_a_device_that_it_needs() -> None:
    """It is saved for a device that is to leave, given up, and waits; others are let go at once."""
    scene = Scene()
    marking = Marking(scene.run, None)
    assert not marking.is_due(0.0)

    scene.run.leavers["b"] = "stopped"

    assert marking.is_due(0.0)
    marking.begin(0.0)
    scene.save("a", "b")
    scene.run.lose("b", "stopped", counts=True)
    assert marking.end()
    scene.run.saved()
    marking.saved(0.1)
    assert RoundHeld(0, 5, ["b"]) in scene.events
    state = scene.run.state
    assert (state.members, state.awaited, state.step) == ({}, {"b"}, 5)
    spare = Scene(min_devices=1)
    spare.run.leavers["b"] = "stopped"
    assert not Marking(spare.run, None).is_due(0.0)


@pytest.mark.parametrize("savers", ["ab", "a"])
def test_a_stop_saves_what_all_have_saved(savers: str) -> None:
    """Where a device has not answered in time, the last checkpoint counts; it is named."""
    scene = Scene()
    pausing = Pausing(scene.run)
    pausing.ask(Wish("pause", is_urgent=True), 0.0)
    pausing.begin(1.0)

    scene.save(*savers)

    end_s = STEP_PATIENCE_S + PAUSE_PATIENCE_S
    assert [pausing.is_over(s) for s in (end_s - 0.1, end_s)] == [savers == "ab", True]
    assert pausing.is_worth_saving is (savers == "ab")
    assert (RoundUnsaved(0, 5, ["b"]) in scene.events) is (savers == "a")


def test_who_is_back_before_the_round_is_saved_is_not_sent_away() -> None:
    """A device that has saved itself, left and come back is in the round that goes on at once."""
    scene = Scene()
    marking, run = Marking(scene.run, None), scene.run
    run.leavers["b"] = "stopped"
    marking.is_due(0.0)
    marking.begin(0.0)
    scene.save("a", "b")
    run.lose("b", "stopped", counts=True)
    assert marking.end()

    run.join(Member("b", 1, 4, 1, is_local=False, marks=True), num_samples=9)
    run.saved()
    marking.saved(0.1)

    assert run.state.ready.keys() == {"a", "b"}
    assert (run.state.awaited, run.must_rewind) == (set(), True)
