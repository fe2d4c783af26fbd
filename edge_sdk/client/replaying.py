"""Of which samples the coordinator has kept the hidden state, so that it is not computed again.

Only where the device's blocks are frozen, and only while nothing changes in them. What both sides
count with stands in `edge_sdk/protocol/replay.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from edge_sdk.data.batches import MicroBatch
from edge_sdk.protocol.messages import RoundStart
from edge_sdk.protocol.replay import Unchanged, sent_rows
from edge_sdk.runtime.interface import Runtime

log = logging.getLogger(__name__)


class Replaying:
    """What one device knows of what is kept of its samples."""

    def __init__(self, *, is_asked: bool) -> None:
        """Begin with nothing; unless *is_asked* for it, it stays so."""
        self.is_asked, self._kept = is_asked, set[int]()
        self._unchanged, self._is_checked = Unchanged(), False
        self.is_used = False
        """Whether a state of this step was not computed."""

    def begin(self, start: RoundStart, tensors: Iterable[str]) -> None:
        """Take an order in; where the blocks change, nothing that is kept holds any more."""
        if not self._unchanged.begin(start, tensors):
            self._kept.clear()

    def forget(self) -> None:
        """Begin anew: the coordinator does so too."""
        self._unchanged.forget()
        self._kept.clear()

    def rows(self, batch: MicroBatch) -> tuple[int, ...]:
        """Return the sequences of a micro-batch whose state is kept."""
        found = tuple(row for row, sample in enumerate(batch.samples) if sample in self._kept)
        self.is_used |= bool(found)
        return found

    def samples(self, batch: MicroBatch, runtime: Runtime) -> tuple[int, ...]:
        """Return the samples whose states may be kept; none where another pass gives others."""
        if self.is_asked and not self._is_checked:
            one = without(batch, range(1, len(batch.lengths)))  # noise is in every sequence
            self._is_checked, self.is_asked = True, not runtime.is_random(one)
            if not self.is_asked:
                log.warning("replay.off reason=%s", "its frozen blocks draw numbers, as dropout")
        return batch.samples if self.is_asked else ()

    def answered(self, batch: MicroBatch, *, kept: bool) -> None:
        """Take in whether every state of a micro-batch is kept."""
        if kept and self.is_asked:
            self._kept.update(batch.samples)


def without(batch: MicroBatch, rows: Sequence[int]) -> MicroBatch:
    """Return a micro-batch without the sequences *rows*, as wide as it was."""
    if not rows:
        return batch
    rest = sent_rows(rows, len(batch.lengths))
    return MicroBatch(
        batch.input_ids[rest],
        batch.lengths[rest],
        batch.labels[rest],
        None if batch.pooled is None else batch.pooled[rest],
        tuple(batch.samples[row] for row in rest),
    )
