"""Whatever happens to a run, and in whichever order, there is a way on."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.rounds.state import Action, Phase, RunState, debts, drop_member
from tests.coordinator.rounds.test_state import act, make_state, member, play

NAMES = st.sampled_from("abc")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), NAMES, st.integers(1, 3), st.booleans()),
        st.tuples(st.sampled_from(["leave", "arrive", "upload", "report", "cut", "hang"]), NAMES),
        st.tuples(st.just("act")),
        st.tuples(st.just("act")),
    ),
    max_size=60,
)


def cut(state: RunState, name: str) -> None:
    """Go on without a member, as after a deadline, where enough others are left."""
    if state.is_in_round and len(state.members) > state.min_devices:
        drop_member(state, name)


def lose_if_due(state: RunState, name: str) -> None:
    """Lose a device that is waited for, as after its patience."""
    if name in debts(state):
        state.leave(name)


def assert_something_is_due(state: RunState) -> None:
    """Whoever is waited for is there to be lost, and a run waits for nobody only for devices."""
    owed = debts(state)
    assert owed.keys() <= state.ready.keys() | state.awaited
    if state.decide() is Action.WAIT and not owed:
        assert state.phase is Phase.GATHERING
        assert len(state.ready) < state.min_devices


@given(EVENTS, st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=300)
def test_any_sequence_of_events_has_a_way_on(
    events: list[Any], min_devices: int, labels_on_device: bool
) -> None:
    """Nothing raises, steps stay in their round, and willing devices always finish the run."""
    state = make_state(min_devices=min_devices, labels_on_device=labels_on_device)
    for kind, *details in events:
        action = state.decide()
        if kind == "act" and action is Action.CLOSE:
            return
        if kind == "act":
            act(state, action)
        elif kind == "join":
            state.join(member(details[0], details[1], is_local=details[2]))
        else:
            happen = {
                "leave": state.leave,
                "arrive": state.arrive,
                "upload": state.upload,
                "report": state.report_eval,
                "cut": lambda name: cut(state, name),
                "hang": lambda name: lose_if_due(state, name),
            }
            happen[kind](details[0])
        assert_something_is_due(state)
        assert state.members.keys() <= state.ready.keys()
        if state.phase is not Phase.CLOSING:
            assert state.first_step <= state.step <= state.end_step
        if state.phase in (Phase.TRAINING, Phase.COLLECTING):
            assert len(state.members) >= min_devices

    for name in "abc":
        if name not in state.ready:
            state.join(member(name))
    if state.is_handed_out:
        for name in "abc":
            state.report_eval(name)

    assert play(state, *"abc")[-1] is Action.CLOSE
