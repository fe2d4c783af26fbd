"""How far a comparison is, and when it will be over: arithmetic on a clock that is an argument."""

from __future__ import annotations

from coordinator.lab.comparison.run_count import RunCount


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """What it shows."""
        return self.now_s


def test_what_is_left_follows_from_what_was() -> None:
    """Runs of one method take as long as each other; what a run tells of itself counts first."""
    clock, told, shown = Clock(), [], []
    count = RunCount(["a", "a", "b", "b"], told.append, shown.append, clock)

    count.begin("a, seed 0")
    assert (shown, count.left_s()) == (["run 1 of 4: getting ready: a, seed 0"], None)
    clock.now_s = 10.0
    count.doing("round 1 of 4", 0.25)
    assert count.left_s() == 30.0 + 3 * 40.0  # so far, one run is like the other
    clock.now_s = 40.0
    assert count.end("loss 1") == 40.0
    count.begin("a, seed 1")
    count.end("loss 1")
    count.begin("b, seed 0")
    clock.now_s = 60.0
    count.doing("round 2 of 4", 0.5)

    assert count.left_s() == 20.0 + 20.0  # nothing is known of b yet but what a took
    assert told[0] == "run 1 of 4: a, seed 0: loss 1; 40 s; about 2 min left"
    assert shown[-1] == "run 3 of 4: round 2 of 4; about 40 s left: b, seed 0"


def test_runs_that_are_there_count() -> None:
    """They are told of once, with the time that they took before; one that cannot be is none."""
    clock, told = Clock(), []
    count = RunCount(["a", "a", "b", "b"], told.append, [].append, clock)

    count.kept(7.0)
    count.kept(9.0)
    assert count.left_s() == 16.0
    count.skip("b: it cannot run")
    count.begin("b, seed 1")
    clock.now_s = 5.0
    count.end("loss 2")

    assert told == [
        "2 of 4 runs were there already",
        "run 3 of 4: b: it cannot run",
        "run 3 of 3: b, seed 1: loss 2; 5 s",
    ]
    assert (count.done, count.total) == (3, 3)


def test_a_search_makes_the_count_a_lower_bound() -> None:
    """While one may ask for more, runs and time are at least so many; then they are that."""
    clock, told, shown = Clock(), [], []
    count = RunCount(["a", "b"], told.append, shown.append, clock, num_searches=1)

    count.begin("a, rate 1")
    clock.now_s = 10.0
    count.end("loss 3")
    count.further("a")
    count.begin("a, rate 2")
    clock.now_s = 20.0
    count.end("loss 2")
    count.search_ended("a: rate 2")
    count.begin("b, rate 2")
    clock.now_s = 30.0
    count.end("loss 2")

    assert told == [
        "run 1 of at least 2: a, rate 1: loss 3; 10 s; at least 10 s left",
        "run 2 of at least 3: a, rate 2: loss 2; 10 s; at least 10 s left",
        "a: rate 2",
        "run 3 of 3: b, rate 2: loss 2; 10 s",
    ]
    assert count.num_run == 3
