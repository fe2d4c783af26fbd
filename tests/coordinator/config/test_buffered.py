"""What makes no sense without a barrier is refused in one line, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.config.buffered import BufferedConfig
from coordinator.config.exchange import ExchangeConfig
from coordinator.config.planning import PlanningConfig
from coordinator.config.replay import ReplayConfig
from coordinator.config.run import DeviceSettings, ServeConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"aggregation": "fedavg"}, "needs aggregation: exact"),
        ({"aggregation": "fedex"}, "needs aggregation: exact"),
        ({"aggregation": "stack"}, "needs aggregation: exact"),
        ({"round_deadline_s": 5.0}, "no round has an end"),
        ({"trained_by": "coordinator"}, "trained_by has none"),
        ({"exchange": ExchangeConfig(codec="int8")}, "travel whole"),
        ({"replay": ReplayConfig(when="auto")}, "set it to never"),
        ({"devices": {"a": DeviceSettings(codec="residual")}}, "use int8"),
        ({"planning": PlanningConfig(ranks="rngwp")}, "use uniform or fixed"),
        ({"planning": PlanningConfig(split="armsc")}, "set it to false"),
    ],
)
def test_what_needs_everybody_at_once_is_refused(settings: dict[str, Any], says: str) -> None:
    """A setting that counts on rounds that end together is named, with what to do."""
    with pytest.raises(ValueError, match=says) as caught:
        ServeConfig(model="m", round_mode="buffered", **{"aggregation": "exact"} | settings)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["size", "max_staleness"])
def test_sizes_are_at_least_one(name: str) -> None:
    """A buffer of nothing and a bound of nothing are refused."""
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        BufferedConfig(**{name: 0})


def test_plans_that_stay_are_taken() -> None:
    """Planning before the run is no trouble, where it does not go on."""
    planning = PlanningConfig(split="armsc", replan=False)

    config = ServeConfig(model="m", round_mode="buffered", aggregation="exact", planning=planning)

    assert config.rounds == 10
