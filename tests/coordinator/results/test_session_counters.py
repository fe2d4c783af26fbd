"""Bytes are those of the whole run, whatever sessions and restarts it consists of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.results.session_counters import SessionCounters

amounts = st.lists(st.integers(1, 9), min_size=1, max_size=6)
# Sessions of a device: what each counts between two looks. A first count that is no less than the
# last one of the session before cannot be told from it, so sessions begin small and end large.
sessions = st.lists(amounts.map(lambda each: [*each, 10]), min_size=1, max_size=4)


@given(sessions, st.sets(st.integers(0, 3)))
def test_sums_are_those_of_all_sessions(found: list[list[int]], restarts: set[int]) -> None:
    """Looked at after each amount, and carried over restarts, the sum misses nothing."""
    counters, total, seen = SessionCounters(), 0, 0
    for number, session in enumerate(found):
        now = 0
        if number in restarts:  # the coordinator was started again, from its checkpoint
            facts = counters.facts()
            counters = SessionCounters()
            counters.load(facts)
        for amount in session:
            now += amount
            total += amount
            seen = counters.take("a", {"up": now})["up"]
    assert seen == total


def test_a_session_after_a_restart_may_count_as_far() -> None:
    """Nobody can tell two sessions apart by their counts: a restart says it."""
    before, after = SessionCounters(), SessionCounters()
    before.take("a", {"up": 5, "down": 3})
    after.load(before.facts())

    assert after.take("a", {"up": 5, "down": 4}) == {"up": 10, "down": 7}
