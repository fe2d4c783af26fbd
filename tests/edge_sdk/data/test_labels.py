"""Classes by name: the same names in any order mean the same, others are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.data.labels import find_classes
from edge_sdk.data.rows import Row
from edge_sdk.errors import ConfigError, DataError

NAMES = ("bad", "fair", "good")


def labelled(label: int | str) -> Row:
    """Return a row of that class."""
    return Row(schema="label", where="row:1", text="a", label=label)


@given(st.permutations(NAMES), st.sampled_from(NAMES))
def test_a_name_has_the_number_of_the_run(order: list[str], name: str) -> None:
    """Whatever order a device lists the classes in, each name has the run's number."""
    classes = find_classes(order, NAMES, len(NAMES))

    assert classes.number(labelled(name)) == NAMES.index(name)
    # A number in the data counts in the order of the device's own list.
    assert classes.number(labelled(order.index(name))) == NAMES.index(name)


def test_another_order_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A line says that a device's classes are mapped; the run's own order needs none."""
    find_classes(NAMES, NAMES, 3)
    find_classes((), NAMES, 3)
    assert not caplog.text

    find_classes(NAMES[::-1], NAMES, 3)

    assert "labels.order run='bad', 'fair', 'good' effect=mapped by name" in caplog.text


@pytest.mark.parametrize("label", ["good", "2", 2])
def test_the_names_of_the_run_hold_without_own_ones(label: int | str) -> None:
    """A device that lists no labels may name the run's classes, or number them."""
    assert find_classes((), NAMES, 3).number(labelled(label)) == 2


@pytest.mark.parametrize("labels", [NAMES[1:], NAMES[:2]])
def test_a_device_may_know_some_of_the_classes(labels: tuple[str, ...]) -> None:
    """Names that are all the run's are mapped, also where some are missing."""
    classes = find_classes(labels, NAMES, 3)

    assert [classes.number(labelled(name)) for name in labels] == [NAMES.index(n) for n in labels]
    with pytest.raises(DataError, match="row:1: label is 2, must be at least 0 and below 2"):
        classes.number(labelled(2))


def test_other_names_are_refused_by_name() -> None:
    """One line names what the run does not have, and what it has."""
    with pytest.raises(ConfigError) as caught:
        find_classes(("bad", "fine", "great"), NAMES, 3)

    assert str(caught.value) == (
        "labels: the run has no class 'fine', 'great'; its label_names are 'bad', 'fair', 'good'"
    )
    with pytest.raises(DataError, match="row:1: label is not one of the 3 classes of the run"):
        find_classes((), NAMES, 3).number(labelled("fine"))


def test_a_run_that_sends_no_names_is_taken_by_its_number_of_classes() -> None:
    """An older coordinator says only how many classes there are: own names count as they stand."""
    classes = find_classes(("good", "bad"), (), 3)

    assert [classes.number(labelled(label)) for label in ("good", "bad", 2)] == [0, 1, 2]
