"""Whoever knows the device's blocks finds a text by running candidates through them."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.lab.privacy.search import find_text, merged
from coordinator.lab.privacy.states import Walk, as_received, error_of
from tests.coordinator.lab.privacy.samples import random_texts, slice_of
from tests.tiny import BLOCKS, VOCAB


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_no_split_hides_a_text(family: str, codec: str) -> None:
    """With all tokens as candidates each text comes back whole, in whatever order they come."""
    model, texts = slice_of(family), random_texts(0, 4)
    walk = Walk(model, texts.batches)
    draw = np.random.default_rng(0)

    for split in (1, BLOCKS - 1):
        walk.to(split)
        received = as_received(walk.states, texts.batches, codec)
        error = error_of(walk.states, received, texts)
        batch = texts.batches[0]
        length = int(batch.lengths[0])
        candidates = np.stack([draw.permutation(VOCAB) for _ in range(length)])

        found = find_text(model, split, received[0][0, :length], candidates, error)

        assert found == batch.input_ids[0, :length].tolist()


def test_a_text_that_is_not_among_the_candidates_is_not_found() -> None:
    """The first candidates are taken for want of better ones, and none is made up."""
    model, texts = slice_of("llama"), random_texts(0, 4)
    walk = Walk(model, texts.batches)
    walk.to(1)
    candidates = np.full((8, 1), 5)

    assert find_text(model, 1, walk.states[0][0, :8], candidates, 0.0) == [5] * 8


def test_candidates_of_two_attacks_take_turns() -> None:
    """Each token once, in the order in which either attack prefers it."""
    first, second = np.array([[1, 2, 3]]), np.array([[4, 1, 9]])

    assert merged(first, second).tolist() == [[1, 4, 2]]
