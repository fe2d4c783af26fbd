"""The `exchange` section of a run's configuration: how factors and changes travel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edge_sdk.protocol.codecs import find

# Bytes of factors and changes that a device may move, against the factors of `svd` in float32.
MOST_TIMES_SVD = 1.5
# `svd` moves each factor up and down, four bytes a number.
_SVD_BYTES = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeConfig:
    """How a device's factors go up and what the aggregation has changed comes down."""

    downlink: Literal["full", "budget"] = "full"
    """`full`: a device is sent all that the others have changed. `budget`: of each weight the
    ranks that say most about what the device lacks; the rest stays on its account for the next
    round, and `lag` in metrics.jsonl says how much that is. Only with `aggregation: fedex` or
    `exact`."""
    rank: int | None = None
    """With `downlink: budget`, most ranks of a weight's change that a device is sent in a round;
    None: as many as let all that it sends and gets take 1.5 times the bytes that `aggregation: svd`
    would take for its ranks."""
    codec: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """How the numbers of factors and changes travel. With one of the smaller ones what rounding
    loses is added to the next round's message, in both directions; only with
    `aggregation: fedex` or `exact`.
    A trainable head travels in float32."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.rank is not None and self.downlink == "full":
            raise ValueError("rank is for downlink: budget, got downlink: full")

    @property
    def is_plain(self) -> bool:
        """Whether factors and changes travel whole, and as they are."""
        return self.downlink == "full" and self.codec == "float32"

    def most_ranks(self, own_rank: int, *, is_returned: bool) -> int | None:
        """Return the ranks of a change for a weight with an adapter of *own_rank*; None for all.

        Args:
            own_rank: What goes up.
            is_returned: Whether factors of that rank come down as well.
        """
        if self.downlink == "full":
            return None
        if self.rank is not None:
            return self.rank
        bytes_per_number = find(self.codec).bytes_per_number
        ranks = MOST_TIMES_SVD * _SVD_BYTES * own_rank / bytes_per_number
        ranks -= own_rank * (2 if is_returned else 1)
        return max(1, math.floor(ranks))
