"""F1 and Matthews' correlation of predicted classes, as scikit-learn defines them.

Legend: N sequences, C classes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def confusion(true_N: IntArray, found_N: IntArray, num_classes: int) -> IntArray:
    """Return (C, C) counts: row the true class, column the predicted one."""
    counts_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts_CC, (true_N, found_N), 1)
    return counts_CC


def f1_by_class(counts_CC: IntArray) -> list[float]:
    """Return 2 TP / (2 TP + FP + FN) of each class; 0 of one that is neither there nor found."""
    return [
        2 * int(counts_CC[c, c]) / both if both else 0.0
        for c, both in enumerate((counts_CC.sum(0) + counts_CC.sum(1)).tolist())
    ]


def f1(counts_CC: IntArray) -> float:
    """Return F1 of the second of two classes, which GLUE calls positive."""
    return f1_by_class(counts_CC)[1]


def f1_macro(counts_CC: IntArray) -> float:
    """Return the mean F1 of the classes that are there or were found."""
    is_seen_C = (counts_CC.sum(0) + counts_CC.sum(1)) > 0
    own = [
        value for value, is_seen in zip(f1_by_class(counts_CC), is_seen_C, strict=True) if is_seen
    ]
    return sum(own) / len(own) if own else 0.0


def mcc(counts_CC: IntArray) -> float:
    """Return Matthews' correlation, for any number of classes (Gorodkin's R_K).

    0 where one class alone is there, or one alone was found.
    """
    # Python's integers: products of counts outgrow 64 bits.
    true_C, found_C = counts_CC.sum(1).tolist(), counts_CC.sum(0).tolist()
    right, total = int(np.trace(counts_CC)), int(counts_CC.sum())
    together = right * total - sum(t * f for t, f in zip(true_C, found_C, strict=True))
    spread_true = total**2 - sum(t * t for t in true_C)
    spread_found = total**2 - sum(f * f for f in found_C)
    if not spread_true or not spread_found:
        return 0.0
    return float(together / math.sqrt(spread_true * spread_found))


MEASURES = {"f1": f1, "f1_macro": f1_macro, "mcc": mcc}
"""By name in `evaluation.scores`."""
