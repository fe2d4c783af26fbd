"""Some of the B T positions of a micro-batch as they travel in a header: runs, row by row. Pure.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import RemoteProtocolError

Mask = npt.NDArray[np.bool_]
# Numbers for which a header has room beside the rest: completions are one or a few runs a row.
MAX_RUN_NUMBERS = 4096


def to_runs(mask_BT: Mask) -> tuple[int, ...]:
    """Return where runs of true begin and end, counted row by row: `first, last + 1, first, ...`.

    Nothing where they are more than a header has room for.
    """
    flat = np.concatenate([[False], mask_BT.ravel(), [False]])
    numbers = np.flatnonzero(flat[1:] != flat[:-1])
    return tuple(map(int, numbers)) if len(numbers) <= MAX_RUN_NUMBERS else ()


def from_runs(runs: Sequence[int], rows: int, longest: int) -> Mask:
    """Return what `to_runs` was given, a mask of *rows* x *longest*.

    Raises:
        RemoteProtocolError: the runs are no ascending ones, or beyond the last position.
    """
    numbers = np.array(runs, dtype=np.int64)
    size = rows * longest
    if len(numbers) % 2 or not (np.diff(numbers) > 0).all() or numbers[0] < 0 or numbers[-1] > size:
        raise RemoteProtocolError(f"wanted: no ascending runs of {rows} x {longest} positions")
    edges = np.zeros(size + 1, dtype=np.int8)
    edges[numbers[::2]] = 1
    edges[numbers[1::2]] = -1
    mask_BT: Mask = np.cumsum(edges[:-1]).astype(bool).reshape(rows, longest)
    return mask_BT
