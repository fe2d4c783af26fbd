"""What a run may say of its screening."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.config.run import ServeConfig
from coordinator.config.screening import ScreeningConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"factor": 0.5}, "factor must be 0 or in"),
        ({"factor": float("nan")}, "factor must be 0 or in"),
        ({"hostile": 0}, "hostile must be at least 1"),
        ({"clip": -1.0}, "clip must be in"),
    ],
)
def test_a_mistake_is_one_line(settings: dict[str, Any], said: str) -> None:
    """Numbers that bound nothing, or everything."""
    with pytest.raises(ValueError, match=said):
        ScreeningConfig(**settings)


def test_a_trimmed_mean_needs_common_factors() -> None:
    """Under `exact` everybody keeps factors of their own: a mean of them says nothing."""
    trimmed = ScreeningConfig(method="trimmed-mean")

    with pytest.raises(ValueError, match="'trimmed-mean' needs an aggregation after which"):
        ServeConfig(model="m", screening=trimmed, aggregation="exact")
    for rule in ("fedex", "svd"):
        assert ServeConfig(model="m", screening=trimmed, aggregation=rule).screening is trimmed
