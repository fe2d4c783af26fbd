"""Who keeps a run waiting is named, and lost in the end; who is only slow is not."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest

from coordinator.rounds.progress import (
    MOST_LOOK_S,
    NAME_AFTER_S,
    PACE_FACTOR,
    Late,
    Look,
    ProgressClock,
    Reminder,
)
from coordinator.rounds.state import Conduct, Debt, Owed

PATIENCE_S = 120.0
HERE = frozenset("abc")


def step(number: int, kind: Owed = Owed.INPUT) -> Debt:
    """What a device owes in a step."""
    return Debt(kind, (1, number, 0))


class Watch:
    """A clock that is looked at once a second, and what it has shown."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.clock, self.now_s = ProgressClock(patience_s), 0.0
        self.named: list[tuple[float, Late]] = []
        self.answered: list[Late] = []
        self.lost: list[tuple[float, Late]] = []

    def wait(
        self,
        seconds: float,
        owed: Mapping[str, Debt],
        moved: Mapping[str, int] | None = None,
        here: Collection[str] = HERE,
    ) -> None:
        """Let time pass in which nothing changes, until somebody is lost."""
        began_s, num_lost = self.now_s, len(self.lost)
        while self.now_s < began_s + seconds and len(self.lost) == num_lost:
            self.now_s += 1.0
            self.note(self.clock.look(self.now_s, owed, moved or {}, here), began_s)

    def note(self, look: Look, began_s: float) -> None:
        """Keep what was shown."""
        self.named += [(self.now_s - began_s, late) for late in look.named]
        self.lost += [(self.now_s - began_s, late) for late in look.lost]
        self.answered += look.answered

    def done(self) -> None:
        """Look when nobody owes anything."""
        self.note(self.clock.look(self.now_s, {}, {}, HERE), self.now_s)


def test_a_reminder_comes_at_doubling_intervals() -> None:
    """It speaks at 15, 30, 60, 120 s, and once where it was not asked for long."""
    reminder = Reminder(15.0)
    assert [s for s in range(200) if reminder.is_due(s)] == [15, 30, 60, 120]

    late = Reminder(15.0)
    assert [s for s in (100, 101, 119, 120) if late.is_due(s)] == [100, 120]


def test_who_hangs_is_named_and_then_lost() -> None:
    """At 15, 30 and 60 s without progress it is named, after the patience it is lost."""
    watch = Watch()
    watch.wait(200, {"b": step(1)})

    # The first look begins the wait.
    assert [s - 1 for s, _ in watch.named] == [15.0, 30.0, 60.0]
    assert [(s - 1, late.device) for s, late in watch.lost][0] == (PATIENCE_S, "b")
    assert watch.named[0][1] == Late("b", step(1), 15.0, None)


def test_others_are_what_a_late_device_is_compared_with() -> None:
    """The median of what the other devices took for the like stands beside its name."""
    watch = Watch()
    for number in range(3):
        owed = {name: step(number) for name in "abc"}
        watch.wait(1, owed)
        watch.wait(3, owed)
        watch.done()
    watch.wait(20, {"b": step(3)})

    assert [late.others_s for _, late in watch.named] == [3.0]


def test_a_device_that_moves_bytes_is_never_lost() -> None:
    """One packet in a while is progress, whichever way it goes; so is a report of a local step."""
    watch = Watch()
    for number in range(50):
        watch.wait(NAME_AFTER_S - 2, {"b": step(0, Owed.UPLOAD)}, {"b": number})

    assert watch.named == []
    assert watch.lost == []


def test_a_slow_device_gets_what_it_usually_takes() -> None:
    """Its own steps of 100 s allow four times that, and it is not named before."""
    watch = Watch()
    watch.wait(101, {"b": step(0)})
    watch.done()
    watch.named.clear()
    watch.wait(PACE_FACTOR * 100 + 10, {"b": step(1)})

    assert watch.named == []
    assert [s - 1 for s, _ in watch.lost] == [PACE_FACTOR * 100]


def test_a_step_that_takes_everybody_long_loses_nobody() -> None:
    """Where the others take 100 s, a device without a past may take four times that."""
    watch = Watch()
    watch.wait(101, {name: step(0) for name in "ac"})
    watch.done()
    watch.wait(PACE_FACTOR * 100 - 1, {"b": step(1)})

    assert watch.lost == []


def test_a_kind_of_work_has_a_pace_of_its_own() -> None:
    """Long evaluations do not excuse a step that hangs."""
    watch = Watch()
    watch.wait(101, {"b": step(0, Owed.EVALUATION)})
    watch.done()
    watch.wait(130, {"b": step(0)})

    assert [s - 1 for s, _ in watch.lost] == [PATIENCE_S]


def test_a_device_that_was_lost_for_honest_work_is_given_longer() -> None:
    """Twice as long the next time, and four times at most: else it would be lost for ever."""
    watch = Watch()
    for _ in range(4):
        watch.wait(10 * PATIENCE_S, {"b": step(0)})

    waited_s = [late.seconds for _, late in watch.lost]
    assert waited_s == [PATIENCE_S, 2 * PATIENCE_S, 4 * PATIENCE_S, 4 * PATIENCE_S]


def test_who_was_named_is_told_of_when_it_answers() -> None:
    """Once, with all that it took; one that left has not answered."""
    watch = Watch()
    watch.wait(21, {"b": step(0), "c": step(0)})
    watch.note(watch.clock.look(watch.now_s, {}, {}, {"b"}), watch.now_s)
    watch.done()

    assert watch.answered == [Late("b", step(0), 20.0, None)]


def test_time_in_which_the_coordinator_computes_or_stands_still_is_nobodys() -> None:
    """A pause does not count, nor what passes between two looks beyond a moment."""
    watch = Watch()
    watch.wait(2, {"b": step(0)})
    watch.now_s += 1000.0
    watch.clock.pause(watch.now_s)
    watch.wait(2, {"b": step(0)})
    watch.now_s += 1000.0
    watch.wait(1, {"b": step(0)})
    (late,) = watch.clock.look(watch.now_s, {"b": step(0)}, {}, HERE).lost or [None]

    assert late is None
    assert watch.named == []
    assert watch.clock.late() == {"b"}
    watch.wait(NAME_AFTER_S - 3 - MOST_LOOK_S, {"b": step(0)})
    assert [late.seconds for _, late in watch.named] == [NAME_AFTER_S]


@pytest.mark.parametrize("patience_s", [1.0, 2.0])
def test_a_small_patience_names_sooner(patience_s: float) -> None:
    """Who is lost has been named before."""
    watch = Watch(patience_s)
    for _ in range(30):
        watch.now_s += 0.1
        watch.note(watch.clock.look(watch.now_s, {"b": step(0)}, {}, HERE), 0.0)

    assert watch.named[0][0] < watch.lost[0][0]


def test_a_device_on_its_way_back_has_the_patience_and_no_more() -> None:
    """Whatever its steps have taken."""
    watch = Watch()
    watch.wait(101, {"b": step(0)})
    watch.done()
    watch.wait(130, {"b": step(0, Owed.RETURN)}, here=())

    assert [s - 1 for s, _ in watch.lost] == [PATIENCE_S]


def test_the_end_of_a_session_is_no_progress() -> None:
    """Who left while it was waited for gets no second patience; a new session that moves counts."""
    watch = Watch()
    watch.wait(100, {"b": step(0, Owed.RETURN)}, {"b": 50})
    watch.wait(10, {"b": step(0, Owed.RETURN)}, {})
    assert watch.lost == []
    watch.wait(1, {"b": step(0, Owed.RETURN)}, {"b": 1})
    watch.wait(PATIENCE_S - 1, {"b": step(0, Owed.RETURN)}, {})
    assert watch.lost == []
    watch.wait(1, {"b": step(0, Owed.RETURN)}, {})

    assert [late.device for _, late in watch.lost] == ["b"]


def test_who_is_lost_again_and_again_sits_rounds_out() -> None:
    """Nothing after the first loss, then 1, 2, 4, 8 and 8 rounds; an upload clears it."""
    conduct, sat = Conduct(), []
    for round_ in (0, 10, 20, 30, 40, 50):
        conduct.lost("b", round_)
        sat.append(sum(bool(conduct.resting("ab", later)) for later in range(round_ + 1, 60)))
    conduct.finished("b")
    conduct.lost("b", 70)

    assert sat == [0, 1, 2, 4, 8, 8]
    assert conduct.resting("ab", 71) == set()


def test_a_device_may_break_the_rules_so_often() -> None:
    """The third time the run is over for it, and for nobody else."""
    conduct = Conduct()
    for _ in range(2):
        conduct.expelled("b")
    assert not conduct.is_over("b")

    conduct.expelled("b")

    assert conduct.is_over("b")
    assert not conduct.is_over("a")
