"""The script of faults: each begins once, at its moment, and ends once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.lab.experiment.config import FaultConfig
from coordinator.lab.experiment.faults import FaultSchedule


def test_a_fault_at_a_time_begins_once_and_ends_after_its_seconds() -> None:
    """Before its time nothing is due; after its end nothing is."""
    fault = FaultConfig(board="a", do="throttle", factor=0.5, at_s=10.0, seconds=5.0)
    script = FaultSchedule([fault])

    due = [[(d.begins, d.fault) for d in script.due(t, {})] for t in (9.9, 10.0, 14.9, 15.0, 99.0)]

    assert due == [[], [(True, fault)], [], [(False, fault)], []]


def test_a_fault_at_a_step_waits_for_its_own_board() -> None:
    """Steps of other boards do not count."""
    fault = FaultConfig(board="a", do="kill", at_step=3)
    script = FaultSchedule([fault])

    assert script.due(1.0, {"a": 2, "b": 9}) == []
    assert [d.begins for d in script.due(2.0, {"a": 4})] == [True]
    assert script.due(3.0, {"a": 5}) == []


def test_a_cut_ends_by_itself() -> None:
    """The relay ends it to the millisecond; the script says nothing."""
    script = FaultSchedule([FaultConfig(board="a", do="cut", at_s=0.0, seconds=1.0)])

    assert [d.begins for d in script.due(0.0, {})] == [True]
    assert script.due(5.0, {}) == []


def test_who_comes_back() -> None:
    """A board is on its way back from the fault on until its program is started again."""
    back = FaultConfig(board="a", do="power-cut", at_s=1.0, seconds=2.0)
    gone = FaultConfig(board="b", do="power-cut", at_s=1.0)
    script = FaultSchedule([back, gone])

    assert not script.brings_back("a")
    script.due(1.0, {})
    assert (script.brings_back("a"), script.brings_back("b")) == (True, False)
    script.due(3.0, {})
    assert not script.brings_back("a")


@given(
    st.lists(st.tuples(st.floats(0, 20), st.none() | st.floats(0.1, 20)), max_size=6),
    st.lists(st.floats(0, 50), max_size=12).map(sorted),
)
def test_every_fault_that_has_come_is_told_once(
    faults: list[tuple[float, float | None]], times: list[float]
) -> None:
    """However often one looks, beginnings and ends are those whose moment has passed."""
    script = FaultSchedule(
        [FaultConfig(board="a", do="kill", at_s=at_s, seconds=s) for at_s, s in faults]
    )
    told = [(now_s, due) for now_s in times for due in script.due(now_s, {})]

    begun = [due.fault.at_s for _, due in told if due.begins]
    assert sorted(begun) == sorted(at_s for at_s, _ in faults if times and at_s <= times[-1])
    seen_s = {at_s: next(t for t in times if t >= at_s) for at_s in begun}
    ended = [due.fault for _, due in told if not due.begins]
    expected = [
        (at_s, s)
        for at_s, s in faults
        if at_s in seen_s and s is not None and times[-1] >= seen_s[at_s] + s
        # An end is looked for from the next look on.
        if any(t >= seen_s[at_s] + s for t in times[times.index(seen_s[at_s]) + 1 :])
    ]
    assert sorted((f.at_s, f.seconds) for f in ended) == sorted(expected)
