"""What is done next follows from what has happened, and whatever happens there is a way on."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.rounds.state import Action, Member, Phase, RunState, may_leave
from edge_sdk.errors import LocalProtocolError


def make_state(**changes: Any) -> RunState:
    """Two rounds of two steps for two devices."""
    wanted: dict[str, Any] = {
        "total_rounds": 2,
        "steps_per_round": 2,
        "min_devices": 1,
        "labels_on_device": False,
        **changes,
    }
    return RunState(**wanted)


def member(name: str, num_micro: int = 1, *, is_local: bool = False) -> Member:
    """A device that is ready."""
    return Member(name, 1, 4, num_micro, is_local)


def play(state: RunState, *names: str) -> list[Action]:
    """Let every device do its part until the run waits for something else; returns what was done.

    Local members upload at once; others send whatever their wave needs.
    """
    done: list[Action] = []
    for _ in range(200):
        action = state.decide()
        if action is Action.WAIT and state.phase is Phase.TRAINING:
            for name in state.expected() & set(names):
                state.arrive(name)
        elif action is Action.WAIT and state.phase is Phase.COLLECTING:
            for name in state.members.keys() & set(names):
                state.upload(name)
        if action is Action.WAIT:
            action = state.decide()
        if action is Action.WAIT:
            return done
        done.append(action)
        act(state, action)
        if action is Action.CLOSE:
            return done
    raise AssertionError(f"no end in sight: {done}")


def act(state: RunState, action: Action) -> None:
    """Carry an action out, as the executor does when all goes well."""
    if action is Action.START_ROUND:
        state.start_round()
    elif action is Action.FORWARD:
        state.finish_forward()
    elif action in (Action.RUN_WAVE, Action.BACKWARD):
        state.finish_wave()
    elif action is Action.AGGREGATE:
        state.finish_round(evaluating=set(state.members))
        state.saved()
    elif action is Action.HAND_OUT:
        state.hand_out()
        for name in list(state.awaiting_eval):
            state.report_eval(name)


S, W, A, H, C = (
    Action.START_ROUND,
    Action.RUN_WAVE,
    Action.AGGREGATE,
    Action.HAND_OUT,
    Action.CLOSE,
)
UP, DOWN = Action.FORWARD, Action.BACKWARD
WHOLE_RUNS = [
    ("one device", {}, [member("a")], [S, W, W, A, S, W, W, A, H, C]),
    (
        "labels on the devices",
        {"labels_on_device": True, "total_rounds": 1},
        [member("a"), member("b")],
        [S, UP, DOWN, UP, DOWN, A, H, C],
    ),
    (
        "unequal micro-batches",
        {"total_rounds": 1},
        [member("a", 1), member("b", 3)],
        [S, W, W, W, W, W, W, A, H, C],
    ),
    (
        "whole models only",
        {"total_rounds": 1},
        [member("a", is_local=True), member("b", is_local=True)],
        [S, A, H, C],
    ),
    (
        "one whole model",
        {"total_rounds": 1},
        [member("a", 2, is_local=True), member("b")],
        [S, W, W, A, H, C],
    ),
]


@pytest.mark.parametrize(
    ("changes", "members", "expected"),
    [case[1:] for case in WHOLE_RUNS],
    ids=[case[0] for case in WHOLE_RUNS],
)
def test_a_whole_run(
    changes: dict[str, Any], members: list[Member], expected: list[Action]
) -> None:
    """A run in which nothing goes wrong does these things in this order."""
    state = make_state(**changes)
    for one in members:
        state.join(one)

    assert play(state, *(one.name for one in members)) == expected
    assert state.step == state.total_rounds * state.steps_per_round


def test_a_run_waits_for_enough_devices() -> None:
    """No round starts before as many devices are ready as it needs."""
    state = make_state(min_devices=2)

    state.join(member("a"))
    alone = state.decide()
    state.join(member("b"))

    assert (alone, state.decide()) == (Action.WAIT, Action.START_ROUND)


@pytest.mark.parametrize(
    ("labels_on_device", "is_forward_done", "arrived", "expected"),
    [
        (False, False, set(), Action.WAIT),
        (False, False, {"a"}, Action.WAIT),
        (False, False, {"a", "b"}, Action.RUN_WAVE),
        (True, False, {"a"}, Action.WAIT),
        (True, False, {"a", "b"}, Action.FORWARD),
        (True, True, set(), Action.WAIT),
        (True, True, {"a", "b"}, Action.BACKWARD),
    ],
)
def test_a_wave_waits_for_everybody(
    labels_on_device: bool, is_forward_done: bool, arrived: set[str], expected: Action
) -> None:
    """Each half of a wave is computed when the last member's part is here."""
    state = make_state(labels_on_device=labels_on_device)
    state.join(member("a"))
    state.join(member("b"))
    state.start_round()
    if is_forward_done:
        state.finish_forward()

    for name in arrived:
        state.arrive(name)

    assert state.decide() is expected


def test_who_joins_late_waits_for_the_next_round() -> None:
    """Members are fixed at a round's start."""
    state = make_state()
    state.join(member("a"))
    state.start_round()

    state.join(member("b"))
    state.arrive("a")

    assert state.members.keys() == {"a"}
    assert state.decide() is Action.RUN_WAVE
    assert play(state, "a", "b")[-1] is Action.CLOSE


def test_the_round_goes_on_without_who_leaves() -> None:
    """Nobody waits for a device that has left, in any phase."""
    state = make_state()
    for name in "abc":
        state.join(member(name))
    state.start_round()
    state.arrive("a")
    state.arrive("b")

    gave_up = state.leave("c")
    during = state.decide()
    state.finish_wave()
    play(state)
    for name in "ab":
        state.arrive(name)
    state.finish_wave()
    state.upload("a")
    waiting = state.decide()
    state.leave("b")

    assert not gave_up
    assert (during, waiting, state.decide()) == (Action.RUN_WAVE, Action.WAIT, Action.AGGREGATE)


def test_who_leaves_a_wave_of_its_own_leaves_an_empty_wave() -> None:
    """When the only device with another micro-batch leaves, the step is still completed."""
    state = make_state(total_rounds=1)
    state.join(member("a", 1))
    state.join(member("b", 3))
    state.start_round()
    for name in "ab":
        state.arrive(name)
    state.finish_wave()

    state.leave("b")

    assert state.expected() == set()
    assert state.decide() is Action.RUN_WAVE
    assert play(state, "a") == [W, W, A, H, C]


@pytest.mark.parametrize("phase", ["TRAINING", "COLLECTING"])
def test_too_few_devices_rewind_the_round(phase: str) -> None:
    """With too few left the round is given up and begins again from the checkpoint's step."""
    state = make_state(min_devices=2)
    for name in "ab":
        state.join(member(name))
    state.start_round()
    while state.phase.name != phase:
        state.finish_wave()

    gave_up = state.leave("b")

    assert gave_up
    assert (state.phase, state.step, state.attempt) == (Phase.GATHERING, 0, 1)
    assert state.decide() is Action.WAIT
    state.join(member("c"))
    assert play(state, "a", "c")[-1] is Action.CLOSE
    assert state.attempt == 3


def test_joining_again_is_leaving_first() -> None:
    """A member that comes back has lost its place in the round."""
    state = make_state()
    for name in "ab":
        state.join(member(name))
    state.start_round()
    state.arrive("b")

    state.join(member("b", 2))

    assert (state.members.keys(), state.arrived) == ({"a"}, set())
    assert state.ready["b"].num_micro == 2


@pytest.mark.parametrize(
    ("round_", "step", "phase"), [(0, 0, "GATHERING"), (1, 3, "GATHERING"), (2, 4, "CLOSING")]
)
def test_restoring_goes_on_from_the_checkpoint(round_: int, step: int, phase: str) -> None:
    """A restored run gathers devices for what is left, or closes when nothing is."""
    state = make_state()

    state.restore(round_, step, attempt=7)
    state.join(member("a"))
    done = play(state, "a")

    assert done[-1] is Action.CLOSE
    assert done.count(Action.AGGREGATE) == 2 - round_
    assert done.count(Action.RUN_WAVE) == 4 - step
    assert state.attempt == 7 + 2 - round_
    assert make_restored(round_, step).phase.name == phase


def make_restored(round_: int, step: int) -> RunState:
    """A state that goes on from there."""
    state = make_state()
    state.restore(round_, step, attempt=0)
    return state


def test_a_mid_round_checkpoint_is_where_a_rewind_goes() -> None:
    """After a pause within a round a rewind goes to the pause, not to the round's start."""
    state = make_restored(1, 3)
    state.join(member("a"))
    state.start_round()

    state.leave("a")

    assert (state.step, state.round, state.first_step, state.end_step) == (3, 1, 2, 4)


def test_closing_waits_for_evaluations() -> None:
    """The result is handed out once, and the run closes when everybody has reported or left."""
    state = make_state(total_rounds=1)
    for name in "ab":
        state.join(member(name))
    state.start_round()
    state.finish_wave()
    state.finish_wave()
    state.finish_round(evaluating={"a", "b"})

    first = state.decide()
    state.hand_out()
    waiting = state.decide()
    state.report_eval("a")
    state.leave("b")

    assert (first, waiting, state.decide()) == (Action.HAND_OUT, Action.WAIT, Action.CLOSE)


def test_a_round_cannot_start_or_end_twice() -> None:
    """Actions out of their phase are our own mistake, and say so."""
    state = make_state()
    with pytest.raises(LocalProtocolError, match="GATHERING"):
        state.finish_round(evaluating=set())
    state.join(member("a"))
    state.start_round()

    with pytest.raises(LocalProtocolError, match="not possible while TRAINING"):
        state.start_round()


def test_after_a_restart_the_round_waits_for_its_devices() -> None:
    """Who took part before a restart is waited for, until it is back or patience ends."""
    state = make_state()
    state.restore(1, 2, attempt=1)
    state.wait_for({"a", "b"})

    state.join(member("a"))
    without_b = state.decide()
    state.stop_waiting({"b"})

    assert (without_b, state.decide()) == (Action.WAIT, Action.START_ROUND)


def test_a_member_trains_the_steps_that_are_left() -> None:
    """Steps count from where a member began the round."""
    state = make_state()
    state.begin_at("b", 1)

    assert (state.num_steps("a"), state.num_steps("b")) == (2, 1)


def test_a_run_may_go_on_with_fewer_than_it_began_with() -> None:
    """Until a step is done a lost device gives the round up; afterwards the others are enough."""
    state = make_state(min_devices=2, least_devices=1)
    for name in ("a", "b"):
        state.join(member(name))
    state.start_round()
    assert state.leave("b")
    state.join(member("b"))
    state.start_round()

    state.report_step()

    assert not state.leave("b")
    assert (state.phase, state.min_devices) == (Phase.TRAINING, 1)


def test_a_member_leaves_where_that_costs_nothing_more() -> None:
    """In mid-round once the round is saved, or others are enough; at its end with the next one."""
    state = make_state(min_devices=2)
    for name in "ab":
        state.join(member(name))
    assert not may_leave(state, "a", {"a"})  # the round begins in a moment, and then a holds it
    state.start_round()
    begun = may_leave(state, "a", {"a"})
    state.step = 1

    assert (begun, may_leave(state, "a", {"a"})) == (True, False)
    state.saved()
    assert may_leave(state, "a", {"a"})
    state.step, state.phase = 2, Phase.COLLECTING
    assert not may_leave(state, "a", {"a"})
    state.upload("a")
    assert not may_leave(state, "a", {"a"})


def test_others_that_are_enough_let_a_member_go() -> None:
    """One of three may go where two are enough, two of them may not."""
    state = make_state(min_devices=2)
    for name in "abc":
        state.join(member(name))
    state.start_round()
    state.step = 1

    assert may_leave(state, "a", {"a"})
    assert not may_leave(state, "a", {"a", "b"})


def test_a_round_counts_an_upload_whose_device_has_left() -> None:
    """What is whole stays in the round, also where too few are left to begin another one."""
    state = make_state(min_devices=2)
    for name in "ab":
        state.join(member(name))
    state.start_round()
    state.step, state.phase = 2, Phase.COLLECTING
    state.upload("a")
    state.kept.add("a")

    gave_up = state.leave("a")
    state.upload("b")

    assert not gave_up
    assert state.ready.keys() == {"b"}
    assert state.decide() is Action.AGGREGATE
    state.finish_round(evaluating=set())
    assert state.kept == set()
