"""What a run may say of its exchange, and how many ranks its default budget comes to."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.config.exchange import ExchangeConfig
from coordinator.config.run import ServeConfig
from edge_sdk.protocol.codecs import find


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
@pytest.mark.parametrize("is_returned", [False, True])
def test_the_default_budget_keeps_within_its_bytes(
    codec: Any, rank: int, is_returned: bool
) -> None:
    """Factors up, or up and down, and a change take at most 1.5 times what `svd` takes."""
    config = ExchangeConfig(codec=codec, downlink="budget")

    ranks = config.most_ranks(rank, is_returned=is_returned)

    assert ranks is not None
    per_number, moved = find(codec).bytes_per_number, rank * (1 + is_returned) + ranks
    assert moved * per_number <= 1.5 * 8.0 * rank < (moved + 1) * per_number


def test_full_has_no_budget() -> None:
    """All ranks travel, in whatever codec; and the default is what it was."""
    assert ExchangeConfig(codec="int8").most_ranks(4, is_returned=True) is None
    assert ExchangeConfig().is_plain
    assert not ExchangeConfig(codec="int8").is_plain
    assert ExchangeConfig(downlink="budget", rank=3).most_ranks(4, is_returned=True) == 3


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
    """They begin anew, or replace what an account would complete."""
    with pytest.raises(ValueError, match=f"aggregation: fedex or exact, got {aggregation}"):
        ServeConfig(model="m", aggregation=aggregation, exchange=ExchangeConfig(codec="int8"))
