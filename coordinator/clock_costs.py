"""How many operations a piece of work takes, for the modelled clock; remembers what it was asked.

The counting itself is `profiler/estimate/memory.py`. The frozen residual of `exact` and importance
are left out: beside the weights of a large model they are small, beside those of a small one that
stands for it they would not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from profiler.estimate.memory import FlopsEstimate, ModelShape, Work, estimate_flops


class Costs:
    """Operations of stretches of one model."""

    def __init__(self, shape: ModelShape, num_blocks: int) -> None:
        self._shape, self.num_blocks = shape, num_blocks
        self._counted = lru_cache(4096)(self._count)

    def flops(
        self,
        first: int,
        stop: int,
        ranks: Mapping[str, int],
        num_sequences: int,
        num_positions: int,
        *,
        front: bool = False,
        tail: bool = False,
    ) -> FlopsEstimate:
        """Operations of blocks first .. stop-1 for one micro-batch, forward and backward.

        Args:
            first: First block.
            stop: The block after the last.
            ranks: Rank of each adapted weight.
            num_sequences: Sequences of the micro-batch.
            num_positions: Tokens of its longest sequence: what is padded is computed too.
            front: Whether embeddings belong to it.
            tail: Whether final norm and head belong to it.
        """
        work = (first, stop, front, tail, tuple(ranks.items()), num_sequences, num_positions)
        return self._counted(*work)

    def _count(
        self,
        first: int,
        stop: int,
        front: bool,
        tail: bool,
        ranks: tuple[tuple[str, int], ...],
        num_sequences: int,
        num_positions: int,
    ) -> FlopsEstimate:
        work = Work(
            first=first,
            stop=stop,
            has_front=front,
            has_tail=tail,
            ranks=dict(ranks),
            micro_batch=num_sequences,
            length=num_positions,
            trains_head=tail,  # where there is one that is trained
        )
        return estimate_flops(self._shape, work)
