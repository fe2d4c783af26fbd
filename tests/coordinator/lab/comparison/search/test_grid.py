"""The search for a learning rate: it ends around the best one, whatever grid it began with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.lab.comparison.search.config import RateSearchConfig
from coordinator.lab.comparison.search.grid import best_rate, edge_of, in_words, next_rate


def search(
    loss: Callable[[float], float], begun: list[float], wanted: RateSearchConfig
) -> dict[float, float]:
    """Return all rates that are tried for a given loss, with it, in their order."""
    losses = {rate: loss(rate) for rate in begun}
    while (rate := next_rate(losses, len(begun), wanted)) is not None:
        assert rate not in losses
        losses[rate] = loss(rate)
    return losses


def valley(best: float, diverges: float = math.inf) -> Callable[[float], float]:
    """Return a loss with one valley over the rate, which is no number from *diverges* on."""
    return lambda rate: math.nan if rate >= diverges else math.log(rate / best) ** 2


rates = st.floats(1e-6, 1e1)


@given(rates, st.lists(rates, min_size=1, max_size=4, unique=True), st.floats(1.5, 50.0))
def test_the_best_rate_ends_inside_of_the_grid(
    best: float, begun: list[float], room: float
) -> None:
    """With trials enough it has worse ones on both sides, near to it, around the valley."""
    wanted = RateSearchConfig(most_trials=60)

    losses = search(valley(best, diverges=best * room), begun, wanted)

    tried, found = sorted(losses), best_rate(losses)
    assert edge_of(losses) == ""
    lower, higher = tried[tried.index(found) - 1], tried[tried.index(found) + 1]
    assert max(found / lower, higher / found) <= wanted.finest * 1.02
    assert lower <= best * 1.01
    assert best <= higher * 1.01


@given(rates, st.integers(0, 6))
def test_trials_are_bounded(best: float, most: int) -> None:
    """No more rates than allowed are tried; what is then at an edge says so."""
    losses = search(valley(best), [1e-3, 1e-2], RateSearchConfig(most_trials=most))

    assert len(losses) <= 2 + most
    assert ("not settled" in in_words(losses)) == (edge_of(losses) != "")


def test_beyond_an_edge_the_grid_grows_by_its_own_factor() -> None:
    """Then the gaps around the best are halved as far as wanted; all numbers can be typed."""
    losses = search(valley(0.1), [0.002, 0.01], RateSearchConfig())

    assert list(losses) == [0.002, 0.01, 0.05, 0.25, 0.112]
    assert in_words(losses) == "learning rate 0.112 of 5 that were tried, between 0.05 and 0.25"
    slow = search(valley(1e-4), [0.01], RateSearchConfig(factor=10, most_trials=3))
    assert list(slow) == [0.01, 0.1, 0.001, 0.0001]
    assert in_words(slow) == ("learning rate 0.0001, the lowest of 4 that were tried: not settled")


def test_one_rate_grows_on_both_sides() -> None:
    """It is first of all no answer: nothing was worse."""
    assert edge_of({0.01: 1.0}) == "only"
    assert in_words({0.01: 1.0}) == "learning rate 0.01, the only one that was tried"
    assert list(search(valley(0.011), [0.01], RateSearchConfig())) == [
        0.01,
        0.04,
        0.0025,
        0.02,
        0.005,
    ]


def test_where_all_diverge_the_search_goes_down() -> None:
    """A rate that blew up is worse than every other; of two such the lower one is better."""
    losses = {1.0: math.nan, 10.0: math.inf}

    assert best_rate(losses) == 1.0
    assert next_rate(losses, 2, RateSearchConfig()) == 0.1
    assert best_rate({**losses, 0.1: 9.0}) == 0.1


def test_without_trials_nothing_is_searched() -> None:
    """The rates of the configuration are all there is."""
    assert search(valley(1.0), [0.1], RateSearchConfig(most_trials=0)) == {0.1: valley(1.0)(0.1)}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"most_trials": -1}, "most_trials must be at least 0"),
        ({"factor": 1.0}, "factor must be from 1.1"),
        ({"finest": 1.0}, "finest must be at least 1.1"),
    ],
)
def test_a_search_that_cannot_end_is_refused(settings: dict[str, float], error: str) -> None:
    """With the bound in the message."""
    with pytest.raises(ValueError, match=error):
        RateSearchConfig(**settings)  # type: ignore[arg-type]
