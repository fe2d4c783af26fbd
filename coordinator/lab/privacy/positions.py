"""What a device tells by naming the positions whose final state it wants.

Pure. A device with `labels: device` names the runs of positions that predict a target
(`protocol/positions.py`): with the lengths that travel beside them they say how long each prompt
and each completion is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdk.data.batches import MicroBatch
from edge_sdk.data.encoding import IGNORE
from edge_sdk.protocol.positions import from_runs, to_runs

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What positions tell of some texts."""

    texts: int
    exact: float
    """Share of the texts of which it is told which positions are targets, one and all."""
    alone: float
    """Share of the texts that no other of the sample resembles in length and targets."""


def told_by(batches: Sequence[MicroBatch]) -> Told | None:
    """Return what the coordinator reads off the headers; None where nothing is named."""
    shapes, hits = list[Shape](), 0
    for batch in batches:
        predicts_BT = batch.predicts
        if predicts_BT is None or not predicts_BT.any():
            return None
        runs = to_runs(predicts_BT)
        named_BT = from_runs(runs, *predicts_BT.shape) if runs else np.ones_like(predicts_BT)
        for row, length in enumerate(batch.lengths):
            # Position t names the target t + 1.
            targets = np.flatnonzero(named_BT[row, : length - 1]) + 1
            labels_T = batch.labels[row, 1:length]
            hits += np.array_equal(targets, np.flatnonzero(labels_T != IGNORE) + 1)
            shapes.append((int(length), *map(int, targets)))
    counts = Counter(shapes)
    alone = sum(count == 1 for count in counts.values())
    return Told(texts=len(shapes), exact=hits / len(shapes), alone=alone / len(shapes))
