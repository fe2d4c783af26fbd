"""Named positions tell lengths of prompts and completions."""

from __future__ import annotations

from coordinator.lab.privacy.positions import told_by
from tests.coordinator.lab.privacy.samples import random_texts


def test_where_targets_stand_is_told_exactly() -> None:
    """Of every text, from the runs alone; texts of one shape hide among each other."""
    texts = random_texts(0, 16)
    lengths = [int(n) for batch in texts.batches for n in batch.lengths]

    told = told_by(texts.batches)

    assert told is not None
    assert (told.texts, told.exact) == (16, 1.0)
    assert told.alone == sum(lengths.count(n) == 1 for n in lengths) / 16


def test_classes_have_no_positions() -> None:
    """A classifier's device names none, so nothing is told."""
    assert told_by(random_texts(0, classes=True).batches) is None
