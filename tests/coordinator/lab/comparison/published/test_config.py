"""What a paper may be said to have published."""

from __future__ import annotations

import pytest

from coordinator.config.scoring import SCORES
from coordinator.lab.comparison.published.config import MEASURES, PublishedRow


def test_a_misspelt_measure_is_refused_by_name() -> None:
    """A number under a word that nothing counts would stand beside nothing of ours."""
    with pytest.raises(ValueError, match="'perplexty' is no measure; there are loss, perplexity,"):
        PublishedRow(method="m", devices="homogeneous", values={"perplexty": 3.5}, source="Fig. 2")


def test_a_row_without_numbers_is_refused() -> None:
    """A row says something."""
    with pytest.raises(ValueError, match="values of 'm' must name at least 1 measure"):
        PublishedRow(method="m", devices="homogeneous", values={}, source="Fig. 2")


def test_every_score_can_be_published() -> None:
    """Scores have the title and digits that they have everywhere."""
    for name, score in SCORES.items():
        assert (MEASURES[name].title, MEASURES[name].digits) == (score.title, score.digits)
