"""A step whose waves are made of what is there ends once, with every micro-batch in it once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.rounds.state import (
    Action,
    Member,
    Owed,
    Phase,
    RunState,
    awaits_gradient,
    debts,
    is_between_steps,
    judge,
    places,
)
from coordinator.rounds.step.open_step import Arrival
from coordinator.rounds.step.wave_choice import Rows
from edge_sdk.protocol.plan import MOST_IN_FLIGHT

ROWS = Rows(2, 8)


def make_state(labels: str = "server", **changes: Any) -> RunState:
    """One round of two steps."""
    wanted: dict[str, Any] = {
        "total_rounds": 1,
        "steps_per_round": 2,
        "min_devices": 1,
        "labels_on_device": labels == "device",
        "wave_tokens": 10_000,
        **changes,
    }
    return RunState(**wanted)


def member(name: str, num_micro: int = 2, *, looks_ahead: bool = True) -> Member:
    """A device that is ready, with micro-batches of two rows."""
    return Member(name, 1, 2 * num_micro, num_micro, is_local=False, looks_ahead=looks_ahead)


def wide(name: str) -> Member:
    """A device with one micro-batch, of twelve rows."""
    return Member(name, 1, 12, 1, is_local=False, looks_ahead=True)


def begun(*members: Member, labels: str = "server") -> RunState:
    """A round that has begun."""
    state = make_state(labels)
    for one in members:
        state.join(one)
    state.start_round()
    return state


def act(state: RunState) -> tuple[Action, list[tuple[str, int]]]:
    """Do what is due, as the executor does; return what, and with which micro-batches."""
    action, wave = state.decide(), places(state)
    if action is Action.FORWARD:
        state.here.send_away(wave)
    elif action in (Action.RUN_WAVE, Action.BACKWARD):
        state.here.answer(wave, is_new_wave=action is Action.RUN_WAVE)
    elif action is Action.FINISH_STEP:
        state.finish_wave()
    return action, wave


def test_whoever_is_there_is_served_and_the_step_waits_for_all() -> None:
    """A device gets its answers without the other, whose last micro-batch ends the step."""
    state = begun(member("a"), member("b"))
    state.here.arrive(("a", 0), ROWS)
    assert act(state) == (Action.RUN_WAVE, [("a", 0)])
    state.here.arrive(("a", 1), ROWS)
    assert act(state) == (Action.RUN_WAVE, [("a", 1)])
    assert state.decide() is Action.WAIT
    assert judge(state, "a", 1, 0) is Arrival.LATER

    state.here.arrive(("b", 0), ROWS)
    assert act(state) == (Action.RUN_WAVE, [("b", 0)])
    assert state.decide() is Action.WAIT
    state.here.arrive(("b", 1), ROWS)
    act(state)

    assert act(state)[0] is Action.FINISH_STEP
    assert (state.step, is_between_steps(state)) == (1, True)


def test_a_wave_takes_a_quarter_of_what_all_send() -> None:
    """While some are computed, the answers to the others are being worked on."""
    names = "abcdefgh"
    state = begun(*(member(name) for name in names))
    for name in names:
        state.here.arrive((name, 0), ROWS)

    assert [len(act(state)[1]) for _ in range(4)] == [2, 2, 2, 2]


def test_labels_on_the_device_go_two_ways() -> None:
    """What went forward together goes back together, when all of its gradients are here."""
    state = begun(member("a", 1), member("b", 1), wide("c"), labels="device")
    for name in "ab":
        state.here.arrive((name, 0), ROWS)
    assert act(state) == (Action.FORWARD, [("a", 0), ("b", 0)])
    assert awaits_gradient(state, ("a", 0))
    assert awaits_gradient(state, ("c", 0)) is False
    state.here.come_back(("a", 0))
    assert awaits_gradient(state, ("a", 0)) is None
    assert state.decide() is Action.WAIT
    state.here.arrive(("c", 0), ROWS)
    assert act(state) == (Action.FORWARD, [("c", 0)])
    state.here.come_back(("b", 0))

    assert act(state) == (Action.BACKWARD, [("a", 0), ("b", 0)])
    assert debts(state).keys() == {"c"}
    assert debts(state)["c"].kind is Owed.GRADIENT


def test_no_more_is_away_than_planning_expects() -> None:
    """Two micro-batches' rows of every member at most are between forward and backward pass."""
    state = begun(member("a", 4), labels="device")
    for micro in range(3):
        state.here.arrive(("a", micro), ROWS)

    waves = [act(state) for _ in range(2)]

    assert waves == [(Action.FORWARD, [("a", 0)]), (Action.FORWARD, [("a", 1)])]
    assert state.decide() is Action.WAIT
    assert debts(state)["a"].kind is Owed.GRADIENT


def test_a_device_gets_its_answers_in_their_order() -> None:
    """A wave goes back after those before it that share a device, however soon it could."""
    state = begun(member("a"), member("b"), wide("c"), labels="device")
    for place in (("a", 0), ("b", 0)):
        state.here.arrive(place, ROWS)
    assert act(state) == (Action.FORWARD, [("a", 0), ("b", 0)])
    state.here.arrive(("a", 1), ROWS)
    assert act(state) == (Action.FORWARD, [("a", 1)])
    for micro in range(2):
        state.here.come_back(("a", micro))
    assert state.decide() is Action.WAIT

    state.here.come_back(("b", 0))

    assert act(state) == (Action.BACKWARD, [("a", 0), ("b", 0)])
    assert act(state) == (Action.BACKWARD, [("a", 1)])


def test_an_older_device_gets_one_thing_at_a_time() -> None:
    """A device that does not look ahead is sent nothing before the gradient that it waits for."""
    state = begun(member("a", looks_ahead=False), member("b"), labels="device")
    for micro in range(2):
        state.here.arrive(("a", micro), ROWS)
    act(state)
    assert state.decide() is Action.WAIT
    state.here.come_back(("a", 0))

    assert act(state) == (Action.BACKWARD, [("a", 0)])
    assert act(state) == (Action.FORWARD, [("a", 1)])


def test_who_leaves_is_waited_for_no_longer() -> None:
    """A step whose last missing device leaves ends; a wave goes back without it."""
    state = begun(member("a", 1), member("b", 1), wide("c"), labels="device")
    for name in "ab":
        state.here.arrive((name, 0), ROWS)
    act(state)
    state.here.come_back(("a", 0))

    state.leave("b")
    assert act(state) == (Action.BACKWARD, [("a", 0)])
    assert state.decide() is Action.WAIT
    state.leave("c")

    assert state.decide() is Action.FINISH_STEP


def test_hidden_states_come_in_order_and_bounded() -> None:
    """What was sent before is stale; what comes before its turn waits; too far breaks the rules."""
    state = begun(member("a", 9))
    for micro in range(MOST_IN_FLIGHT):
        assert judge(state, "a", 0, micro) is Arrival.NOW
        state.here.arrive(("a", micro), ROWS)

    assert judge(state, "a", 0, 0) is Arrival.STALE
    assert judge(state, "a", 0, MOST_IN_FLIGHT) is Arrival.BEYOND
    assert judge(state, "a", 1, MOST_IN_FLIGHT) is Arrival.BEYOND
    assert judge(state, "a", 2, 0) is Arrival.BEYOND
    act(state)
    assert judge(state, "a", 0, MOST_IN_FLIGHT + 1) is Arrival.BEYOND
    assert judge(state, "a", 0, MOST_IN_FLIGHT) is Arrival.NOW
    act(state)
    assert judge(state, "a", 0, MOST_IN_FLIGHT + 1) is Arrival.LATER


NAMES = "abc"
EVENTS = st.lists(
    st.one_of(st.tuples(st.sampled_from(["send", "return", "act"]), st.sampled_from(NAMES))),
    max_size=80,
)


@given(EVENTS, st.tuples(*[st.integers(1, 4)] * 3), st.booleans(), st.booleans(), st.data())
@settings(deadline=None, max_examples=200)
def test_every_micro_batch_counts_once(
    events: list[tuple[str, str]],
    micros: tuple[int, int, int],
    labels_on_device: bool,
    looks_ahead: bool,
    data: st.DataObject,
) -> None:
    """In whichever order things come, each step answers each micro-batch once, in its order."""
    labels = "device" if labels_on_device else "server"
    members = [member(n, m, looks_ahead=looks_ahead) for n, m in zip(NAMES, micros, strict=True)]
    state = begun(*members, labels=labels)
    gone = data.draw(st.sampled_from(["", *NAMES]))
    answered: list[tuple[int, str, int]] = []

    def happen(kind: str, name: str) -> None:
        if kind == "send" and name in state.members:
            micro = state.here.next_micro(name)
            is_due = micro < state.members[name].num_micro
            if is_due and judge(state, name, state.step, micro) is Arrival.NOW:
                state.here.arrive((name, micro), ROWS)
        elif kind == "return":
            waves = state.here.away.waves.values()
            own = [p for wave in waves for p in wave if p[0] == name]
            for place in filter(state.here.is_away, own):
                state.here.come_back(place)
                return
        elif kind == "act" and state.phase is Phase.TRAINING:
            step = state.step
            action, wave = act(state)
            if action in (Action.RUN_WAVE, Action.BACKWARD):
                answered.extend((step, *place) for place in wave)
            if action is Action.WAIT and not debts(state):
                raise AssertionError("it waits for nobody")

    for kind, name in events:
        happen(kind, name)
    if gone:
        state.leave(gone)
    for _ in range(400):
        for name in NAMES:
            for kind in ("send", "return", "act"):
                happen(kind, name)

    assert state.phase is Phase.COLLECTING
    assert max(Counter(answered).values()) == 1
    for one in members:
        own = [(step, micro) for step, name, micro in answered if name == one.name]
        whole = [(step, micro) for step in range(2) for micro in range(one.num_micro)]
        assert own == (whole[: len(own)] if one.name == gone else whole)
