"""While somebody thinks about plans, whoever asks sees those of before, and nothing gets lost."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from coordinator.planning.interface import Planning
from coordinator.rounds.plans.desk import Inquiry, PlanningDesk
from tests.coordinator.planning.problems import FAST, SLOW, make_problem, model_of
from tests.coordinator.planning.test_run_planner import planner_of


class Later(Executor):
    """Thinks when the test says so."""

    def __init__(self) -> None:
        self._held: deque[tuple[Future[Any], Any, Any]] = deque()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep *fn* for later."""
        future: Future[Any] = Future()
        self._held.append((future, fn, args))
        return future

    def think(self) -> None:
        """Answer what was asked."""
        future, fn, args = self._held.popleft()
        try:
            future.set_result(fn(*args))
        except Exception as error:  # noqa: BLE001 - handed on
            future.set_exception(error)


class Asked:
    """A desk with plans for two devices, and what it has answered."""

    def __init__(self) -> None:
        self.planner = planner_of(make_problem(model_of("llama")), "a", "b")
        self.pool, self.answers = Later(), list[Any]()
        self.desk = PlanningDesk(self.planner, lambda: None, self.pool)

    def offer(self, device: str, *, fits: bool = True) -> None:
        """Ask for the plan of a device that comes, and for the names of all that have one."""

        def think(planner: Planning) -> list[str]:
            planner.profiled(device, SLOW)
            assert planner.plan(device) is not None
            assert planner.plans is not None
            return sorted(planner.plans.plans)

        dropped = f"{device} dropped"
        self.desk.ask(
            Inquiry(
                think=think,
                then=self.answers.append,
                fits=lambda _: fits,
                otherwise=lambda: self.answers.append(dropped),
            )
        )


def test_plans_of_before_hold_until_the_answer_is_there() -> None:
    """What is thought out in the meantime is seen by nobody, and then by everybody."""
    asked = Asked()
    desk, before = asked.desk, asked.planner.state()

    asked.offer("c")
    seen = [desk.plan_in_force("c"), desk.is_known("c"), desk.is_open("a"), desk.copy().state()]
    asked.pool.think()

    assert seen == [None, False, True, before]
    assert desk.copy().state() == before
    desk.pump()
    assert asked.answers == [["a", "b", "c"]]
    assert desk.plan_in_force("c") is not None
    assert not desk.is_busy


def test_an_answer_that_does_not_fit_leaves_no_trace() -> None:
    """The planner knows what it knew before the question, and the next one is asked."""
    asked = Asked()
    before = asked.planner.state()

    asked.offer("c", fits=False)
    asked.offer("d")
    asked.pool.think()
    asked.desk.pump()
    left = asked.desk.copy().state()
    asked.pool.think()
    asked.desk.pump()

    assert left == before
    assert asked.answers == ["c dropped", ["a", "b", "d"]]


def test_what_changes_little_waits_for_the_answer() -> None:
    """A step that is reported while somebody thinks counts, in its turn."""
    asked = Asked()
    asked.planner._speeds["a"] = 1.0  # rounds have shown it: it could not measure its own

    asked.offer("c", fits=False)
    asked.desk.stepped("a", 100, 2.0)
    assert not asked.planner._rates
    asked.pool.think()
    asked.desk.pump()

    assert asked.planner._rates == {"a": [50.0]}


def test_an_error_of_thinking_is_raised_where_the_answer_is_taken() -> None:
    """It is raised in the loop's thread, in the device's part, and the next question is asked."""
    asked = Asked()

    def fail(planner: Planning) -> None:
        planner.profiled("c", FAST)
        raise KeyError("unforeseen")

    asked.desk.ask(Inquiry(think=fail, then=asked.answers.append))
    asked.offer("d")
    asked.pool.think()
    with pytest.raises(KeyError, match="unforeseen"):
        asked.desk.pump()
    asked.desk.pump()
    asked.pool.think()
    asked.desk.pump()

    assert asked.answers == [["a", "b", "d"]]
