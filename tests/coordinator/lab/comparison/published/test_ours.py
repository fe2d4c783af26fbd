"""Our value of each published measure, against sums done by hand."""

from __future__ import annotations

import math

import pytest

from coordinator.lab.comparison.cells import Spread
from coordinator.lab.comparison.published.config import MEASURES
from coordinator.lab.comparison.published.ours import OurValues
from tests.coordinator.lab.comparison.made_cells import make_cell

# A point of made cells: 10 samples, 2 s, 300 bytes up and 500 down a step.
CELLS = [
    make_cell([3.0, 2.0, 1.0], method="theirs", trained={"a": 7, "b": 9}),
    make_cell([3.0, 2.5, 2.0, 1.5, 1.0], method="mine", scores={"bleu": 0.6}),
    make_cell([3.0, 1.0, 0.5], method="mine", device_set="homogeneous"),
]
OURS = OurValues(CELLS, "theirs", target=1.5)


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("loss", 1.0),
        ("perplexity", math.e),
        ("accuracy", 25.0),
        ("bleu", 0.6),
        ("perplexity_rise", math.e - math.exp(0.5)),
        ("perplexity_behind", 0.0),
        ("slowdown", 30 / 15),
        ("time_ratio", 6 / 3),
        ("traffic_share", 200.0),
        ("uplink_share", 200.0),
        ("traffic", 4 * 800.0),
        ("modelled_s", 8.0),
    ],
)
def test_a_measure_of_ours_is_what_its_title_says(measure: str, value: float) -> None:
    """Means over seeds, of the run itself or against the reference's with the same seed."""
    found = OURS.of("mine", "heterogeneous", measure)

    assert found is not None
    assert found.mean == pytest.approx(value)


def test_numbers_trained_are_those_of_the_device_with_most() -> None:
    """A paper counts them for its clients, which are alike."""
    assert OURS.of("theirs", "heterogeneous", "trained") == Spread(9, 0.0, 1)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_has_not_run_has_no_value(measure: str) -> None:
    """A method of the paper that is not run here, whatever is asked of it."""
    assert OURS.of("SplitLite", "heterogeneous", measure) is None


def test_values_are_paired_by_seed() -> None:
    """Each run is held against the reference's with its seed, and then the mean is taken."""
    pairs = {0: (1.0, 2.0), 1: (3.0, 1.0)}
    cells = [
        make_cell([4.0, loss], method=method, seed=seed)
        for seed, losses in pairs.items()
        for method, loss in zip(("mine", "theirs"), losses, strict=True)
    ]

    found = OurValues(cells, "theirs", 1.5).of("mine", "heterogeneous", "perplexity_behind")

    differences = [math.exp(mine) - math.exp(theirs) for mine, theirs in pairs.values()]
    assert found is not None
    assert found.mean == pytest.approx(sum(differences) / 2)
    assert found.num_seeds == 2


def test_a_target_that_was_not_reached_is_no_number() -> None:
    """As many times slower than the reference as nobody knows."""
    cells = [make_cell([3.0, 2.9], method="mine"), CELLS[0]]

    assert OurValues(cells, "theirs", 1.5).of("mine", "heterogeneous", "slowdown") is None
