"""Whatever happens to a run, and in whichever order, there is a way on."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.rounds.state import Action, Phase
from tests.coordinator.rounds.test_state import act, make_state, member, play

NAMES = st.sampled_from("abc")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), NAMES, st.integers(1, 3), st.booleans()),
        st.tuples(st.sampled_from(["leave", "arrive", "upload", "report"]), NAMES),
        st.tuples(st.just("act")),
        st.tuples(st.just("act")),
    ),
    max_size=60,
)


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
            }
            happen[kind](details[0])
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
