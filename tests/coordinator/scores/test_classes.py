"""F1 and Matthews' correlation are scikit-learn's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from coordinator.scores.classes import confusion, f1, f1_macro, mcc


@st.composite
def predictions(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Return a number of classes, true ones and predicted ones."""
    num_classes = draw(st.integers(2, 5))
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, num_classes - 1), st.integers(0, num_classes - 1)),
            min_size=1,
            max_size=40,
        )
    )
    return num_classes, [t for t, _ in pairs], [f for _, f in pairs]


@given(predictions())
def test_they_are_those_of_scikit_learn(found: tuple[int, list[int], list[int]]) -> None:
    """Whatever is there and whatever was predicted, all three agree to rounding."""
    num_classes, true, predicted = found

    counts_CC = confusion(np.array(true), np.array(predicted), num_classes)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that nobody predicted
        macro = f1_score(true, predicted, average="macro", zero_division=0.0)
        correlation = matthews_corrcoef(true, predicted)
        second = f1_score(true, predicted, labels=[1], average="macro", zero_division=0.0)
    assert f1_macro(counts_CC) == pytest.approx(macro, abs=1e-12)
    assert mcc(counts_CC) == pytest.approx(correlation, abs=1e-9)
    if num_classes == 2:
        assert f1(counts_CC) == pytest.approx(second, abs=1e-12)


def test_by_hand() -> None:
    """Four right of six: 2 true positives, 1 false one, 1 missed."""
    counts_CC = confusion(np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0]), 2)

    assert f1(counts_CC) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert mcc(counts_CC) == pytest.approx((2 * 2 - 1 * 1) / 9)
