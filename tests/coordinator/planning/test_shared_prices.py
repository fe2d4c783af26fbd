"""Prices that devices share, and that problems hand on, change no plan: to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning.joint import plan_all
from coordinator.planning.plan_set import PlanSet
from coordinator.planning.problem import KnownCosts, PlanningProblem
from edge_sdk.errors import ConfigError
from profiler.profile import DeviceProfile
from tests.coordinator.planning.problems import SLOW, make_problem, model_of

T = TypeVar("T")
MODEL = model_of("llama")


class Forgetful(KnownCosts):
    """Finds everything anew each time it is asked."""

    def of(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what *make* makes."""
        return make()

    def __setitem__(self, key: Hashable, value: object) -> None:
        """Keep nothing."""


def profiles() -> st.SearchStrategy[DeviceProfile]:
    """Boards, some of which are alike in all but memory, speed or link, and some in everything."""
    return st.builds(
        lambda memory, speed, link, widths: replace(
            SLOW,
            memory_bytes=memory,
            flops_per_s=speed,
            up_bytes_per_s=link,
            down_bytes_per_s=link,
            base_bytes=widths[0],
            compute_bytes=widths[0],
            linear_bytes=widths[1],
        ),
        st.sampled_from([None, 3e5, 5e5, 7e5, 1e6, 1e9]),
        st.sampled_from([None, 1e7, 2e7, 9e7]),
        st.sampled_from([1e5, 1e6, 1e7]),
        st.sampled_from([(None, None), (2.0, None), (2.0, 0.5625)]),
    )


def importance() -> st.SearchStrategy[dict[str, float] | None]:
    """Of some weights."""
    names = st.sampled_from(sorted(MODEL[0].targets))
    return st.none() | st.dictionaries(names, st.floats(0.0, 9.0), min_size=1)


def outcome(problem: PlanningProblem) -> PlanSet | str:
    """Return what is planned, or why nothing is."""
    try:
        return plan_all(problem)
    except ConfigError as error:
        return str(error)


def by_itself(problem: PlanningProblem) -> PlanningProblem:
    """Return the problem, with each price of each device found for itself."""
    about = problem.config, problem.facts, problem.model, problem.length, problem.server
    found = replace(problem, known=Forgetful(*about))
    vars(found)["tables"] = Forgetful()
    return found


@settings(max_examples=25)  # each is planned without any memory
@given(
    st.lists(profiles(), min_size=1, max_size=6),
    st.sampled_from(["rngwp", "uniform"]),
    st.sampled_from(["auto", "bfloat16"]),
    importance(),
)
def test_shared_prices_are_those_of_each_device(
    boards: list[DeviceProfile],
    ranks: str,
    codec: str,
    measured: dict[str, float] | None,
) -> None:
    """Random fleets get the plans, with all their reasons, of devices that are priced alone."""
    fleet = {f"d{number}": board for number, board in enumerate(boards)}
    chosen: dict[str, Any] = {"planning": {"ranks": ranks}, "profiles": fleet}
    problem = make_problem(MODEL, **chosen, importance=measured)
    default = replace(problem.config.default, codec=codec)
    problem = replace(problem, config=replace(problem.config, default=default))

    assert outcome(problem) == outcome(by_itself(problem))


@settings(max_examples=25)
@given(st.lists(profiles(), min_size=2, max_size=6), importance(), importance())
def test_what_a_problem_hands_on_is_true_of_the_next(
    boards: list[DeviceProfile],
    before: dict[str, float] | None,
    after: dict[str, float] | None,
) -> None:
    """A device that joins, and then importance that moves, lead to the plans of a fresh start."""
    fleet = {f"d{number}": board for number, board in enumerate(boards)}
    first = make_problem(MODEL, profiles=dict(list(fleet.items())[:-1]), importance=before)
    outcome(first)
    joined = first.updated(fleet, before, {})
    moved = joined.updated(fleet, after, {})

    assert outcome(joined) == outcome(make_problem(MODEL, profiles=fleet, importance=before))
    assert outcome(moved) == outcome(make_problem(MODEL, profiles=fleet, importance=after))
