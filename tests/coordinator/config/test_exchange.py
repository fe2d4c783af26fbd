"""What a run may say of its exchange, and how many ranks its default budget comes to."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.config.exchange import ExchangeConfig
from coordinator.config.run import ServeConfig
from edge_sdk.protocol.codecs import find


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_the_default_budget_keeps_within_its_bytes(codec: Any, rank: int) -> None:
    """Factors up and a change down take at most 1.5 times what `svd` takes up and down."""
    config = ExchangeConfig(codec=codec, downlink="budget")

    ranks = config.most_ranks(rank)

    assert ranks is not None
    per_number = find(codec).bytes_per_number
    assert (rank + ranks) * per_number <= 1.5 * 8.0 * rank < (rank + ranks + 1) * per_number


def test_full_has_no_budget() -> None:
    """All ranks travel, in whatever codec; and the default is what it was."""
    assert ExchangeConfig(codec="int8").most_ranks(4) is None
    assert ExchangeConfig().is_plain
    assert not ExchangeConfig(codec="int8").is_plain
    assert ExchangeConfig(downlink="budget", rank=3).most_ranks(4) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0, "downlink": "budget"}, "rank must be at least 1"),
        ({"rank": 4}, "downlink: full"),
    ],
)
def test_a_mistake_is_one_line(settings: dict[str, Any], said: str) -> None:
    """A rank without a budget, or no rank at all."""
    with pytest.raises(ValueError, match=said):
        ExchangeConfig(**settings)


@pytest.mark.parametrize("aggregation", ["svd", "zeropad", "fedavg", "stack"])
def test_other_rules_are_refused(aggregation: Any) -> None:
    """They replace the factors that an account would complete."""
    with pytest.raises(ValueError, match=f"aggregation: exact, got {aggregation}"):
        ServeConfig(model="m", aggregation=aggregation, exchange=ExchangeConfig(codec="int8"))
