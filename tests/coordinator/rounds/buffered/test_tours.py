"""Each device on its own: tours begin, end, are cut short and go on, and no sample counts twice."""

from __future__ import annotations

import random
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest

from coordinator.rounds.buffered.tours import BufferedState, tour_debts
from coordinator.rounds.state import Action, Debt, Member, Owed, Phase
from edge_sdk.errors import RemoteProtocolError

STEPS, MICRO = 3, 2


def member(name: str, *, is_local: bool = False) -> Member:
    """A device of four samples a step."""
    return Member(name, split=2, batch_size=4, num_micro=MICRO, is_local=is_local)


def make(*names: str, **settings: Any) -> BufferedState:
    """A run whose devices are on their first tours."""
    limits = {"total_rounds": 9, "size": 2, "max_staleness": 2, **settings}
    state = BufferedState(steps_per_round=STEPS, min_devices=1, labels_on_device=False, **limits)
    for name in names:
        state.join(member(name))
    state.start_round()
    for name in names:
        state.begin_tour(name, ())
    return state


def walk(state: BufferedState, name: str, steps: int = STEPS) -> None:
    """Let a device do *steps* of its tour."""
    for _ in range(steps * MICRO):
        tour = state.tours[name]
        step, micro = tour.step, tour.micro
        if state.take_turn(name, step, micro):
            state.serve(name, step, micro, MICRO)
        tour.inputs -= 1


def test_nobody_waits_for_anybody() -> None:
    """A merge is due when the buffer is full, whoever is still on tour."""
    state = make("a", "b", "c")
    walk(state, "a")
    state.end_tour("a")
    state.begin_tour("a", ())

    before = state.decide()
    walk(state, "b")
    state.end_tour("b")

    assert (before, state.decide()) == (Action.WAIT, Action.AGGREGATE)
    assert state.merged(0, evaluating=False) == []
    assert state.standing() == {"a": (0, 1), "c": (0, 1)}
    assert state.tours["a"].begin == STEPS


def test_the_coordinator_steps_after_as_many_steps_of_devices() -> None:
    """Its own step is due after as many device steps as a merge has updates."""
    state = make("a", "b")

    walk(state, "a", 1)
    was_due = state.is_step_due
    walk(state, "b", 1)

    assert (was_due, state.is_step_due) == (False, True)
    state.finish_step()
    assert (state.is_step_due, state.is_step_open, state.schedule_step) == (False, False, 1)


def test_a_tour_that_is_too_old_ends() -> None:
    """After more merges than the bound a tour is over, and the next one begins after it."""
    state = make("a", "slow", size=1, max_staleness=1)
    over = []
    for _ in range(2):
        walk(state, "a")
        state.end_tour("a")
        over.append(state.merged(0, evaluating=False))
        state.begin_tour("a", ())

    assert over == [[], ["slow"]]
    state.begin_tour("slow", (0,))
    tour = state.tours["slow"]
    assert (tour.version, tour.begin, tour.step) == (2, STEPS, STEPS)


@pytest.mark.parametrize(
    ("held", "goes_on", "step"),
    [((), False, 0), ((0,), True, 0), ((0, 2), True, 2), ((9,), False, 0)],
)
def test_a_tour_goes_on_from_the_devices_checkpoint(
    held: tuple[int, ...], goes_on: bool, step: int
) -> None:
    """A device that is back repeats what it must; the coordinator learns only from the rest."""
    state = make("a")
    walk(state, "a", 2)
    state.leave("a")

    state.join(member("a"))

    assert state.begin_tour("a", held) is goes_on
    assert state.tours["a"].step == step
    counted = [state.take_turn("a", step, 0)]
    assert counted == [step == 2]


def test_what_is_out_of_turn_is_refused() -> None:
    """A micro-batch comes once and in order, and an upload after the last of them."""
    state = make("a")

    with pytest.raises(RemoteProtocolError, match="0.0 is due"):
        state.take_turn("a", 0, 1)
    with pytest.raises(RemoteProtocolError, match="an upload after step 0 of 3"):
        state.end_tour("a")


def test_debts_name_what_each_device_owes() -> None:
    """A device owes input, a gradient or an upload; nothing while the coordinator has its input."""
    state = make("a", "b", "c", "d")
    state.join(member("local", is_local=True))
    state.begin_tour("local", ())
    walk(state, "b")
    state.take_turn("c", 0, 0)
    state.take_turn("d", 0, 0)
    state.tours["d"].inputs, state.tours["d"].hidden = 0, 1

    owed = tour_debts(state)

    assert {name: debt.kind for name, debt in owed.items()} == {
        "a": Owed.INPUT,
        "b": Owed.UPLOAD,
        "d": Owed.GRADIENT,
        "local": Owed.UPLOAD,
    }
    assert owed["a"] == Debt(Owed.INPUT, (1, 0, 0))


def test_the_last_merge_ends_all_tours() -> None:
    """After the last merge nobody is on tour, and all that are ready evaluate."""
    state = make("a", "b", total_rounds=1, size=1)
    walk(state, "a")
    state.end_tour("a")

    over = state.merged(0, evaluating=True)

    assert (over, state.phase, state.awaiting_eval) == (["b"], Phase.CLOSING, {"a", "b"})
    assert (state.members, state.decide()) == ({}, Action.HAND_OUT)


class Fleet:
    """Devices that come, go and are killed, a coordinator that is, too, and what was learned."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.state = make("a", "b", "c", total_rounds=10**6)
        self.held = {name: [0] for name in "abc"}
        self.learned: Counter[tuple[str, int, int]] = Counter()
        self.merged: Counter[tuple[str, int]] = Counter()
        self.buffer: list[tuple[str, int]] = []
        self.dropped: set[tuple[str, int]] = set()
        self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        kept = self.state.facts(), self.state.round, self.learned, self.merged, self.buffer
        self.kept = deepcopy((*kept, self.dropped))

    def crash(self) -> None:
        """Begin again from the checkpoint."""
        facts, round_, *rest = deepcopy(self.kept)
        self.learned, self.merged, self.buffer, self.dropped = rest
        for name in list(self.state.ready):
            self.state.leave(name)
        self.state.load_facts(facts)
        self.state.round, self.state.phase = round_, Phase.TRAINING

    def act(self, name: str) -> None:
        """Let something happen to a device."""
        state, draw = self.state, self.draw
        if name not in state.ready:
            state.join(member(name))
            state.phase = Phase.TRAINING
        elif name not in state.members:
            held = [step for step in self.held[name] if draw.random() < 0.8]
            state.begin_tour(name, held)
            begun = state.tours[name].step
            self.held[name] = [*(s for s in self.held[name] if s < begun), begun][-2:]
        elif draw.random() < 0.05:
            state.leave(name)
        elif state.tours[name].step < state.tours[name].end:
            step, micro = state.tours[name].step, state.tours[name].micro
            if state.take_turn(name, step, micro):
                self.learned[name, step, micro] += 1
                state.serve(name, step, micro, MICRO)
            state.tours[name].inputs -= 1
        else:
            tour = state.end_tour(name)
            self.buffer += [(name, step) for step in range(tour.begin, tour.end)]

    def merge(self) -> None:
        """Merge if that is due."""
        if self.state.decide() is Action.AGGREGATE:
            self.merged.update(self.buffer)
            self.buffer = []
            tours = deepcopy(self.state.tours)
            for name in self.state.merged(0, evaluating=False):
                self.dropped |= {(name, s) for s in range(tours[name].begin, tours[name].end)}
            self.save()


@pytest.mark.parametrize("seed", range(20))
def test_each_sample_counts_once_whatever_happens(seed: int) -> None:
    """Through losses, returns and restarts each step is merged once, or named as dropped."""
    fleet = Fleet(seed)
    for _ in range(600):
        fleet.act(fleet.draw.choice("abc"))
        fleet.merge()
        if fleet.draw.random() < 0.005:
            fleet.crash()

    assert set(fleet.merged.values()) == {1}
    assert set(fleet.learned.values()) == {1}
    assert not fleet.merged.keys() & fleet.dropped
    done = fleet.merged.keys() | fleet.dropped | set(fleet.buffer)
    for name in "abc":
        following = fleet.state.next_steps.get(name, 0)
        assert {step for device, step in done if device == name} == set(range(following))
