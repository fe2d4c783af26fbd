"""A small network learns to name tokens from states; the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordinator.lab.privacy import inverter as inverter_file
from coordinator.lab.privacy.inverter import guesses, inverter_ranks, train_inverter
from coordinator.lab.privacy.nearest import Vocabulary
from coordinator.lab.privacy.score import by_frequency, recovered
from coordinator.lab.privacy.states import Walk, windows
from coordinator.lab.privacy.texts import shares_of
from tests.coordinator.lab.privacy.samples import random_texts, slice_of
from tests.tiny import VOCAB


@pytest.fixture(scope="module")
def task() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """States of known texts after two blocks, their tokens, embeddings, shares."""
    model, known = slice_of("llama"), random_texts(1, 150)
    walk = Walk(model, known.batches)
    walk.to(2)
    embeddings = Vocabulary(model, 0).embeddings_VD
    return windows(walk.states, known), known.ids_N, embeddings, shares_of(known, VOCAB)


def test_it_learns_what_states_tell_and_nothing_else(task: tuple[np.ndarray, ...]) -> None:
    """It names tokens of other texts far oftener than frequency does, of shuffled ones as often."""
    seen, ids, embeddings, shares = task
    model, texts = slice_of("llama"), random_texts(0, 100)
    walk = Walk(model, texts.batches)
    walk.to(2)
    own = windows(walk.states, texts)

    inverter = train_inverter(seen, ids, embeddings, shares, 0)

    found = recovered(inverter_ranks(inverter, own, texts.ids_N), texts)["completions"]
    known = by_frequency(shares, texts)["completions"]
    order = np.random.default_rng(0).permutation(len(own))
    control = recovered(inverter_ranks(inverter, own[order], texts.ids_N), texts)["completions"]
    assert found.top1 > 0.5
    assert known.top1 < 0.1
    assert control.top1 < 0.1
    assert (guesses(inverter, own, 1)[:, 0] == texts.ids_N).mean() > 0.5


def test_of_a_large_vocabulary_some_are_told_apart(
    task: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer tokens than there are it still learns, and guesses among all of them."""
    seen, ids, embeddings, shares = task
    few = ids < VOCAB // 2
    monkeypatch.setattr(inverter_file, "MOST_CLASSES", 60)

    inverter = train_inverter(seen[few], ids[few], embeddings, shares, 0)

    best = guesses(inverter, seen, VOCAB)
    assert best.shape == (len(ids), VOCAB)
    assert (best[few, 0] == ids[few]).mean() > 0.5


def test_the_same_seed_gives_the_same_inverter(task: tuple[np.ndarray, ...]) -> None:
    """Bit for bit, and whatever else draws random numbers; another seed gives another."""
    first = train_inverter(*task, 3)  # type: ignore[arg-type]
    torch.manual_seed(99)
    again, other = train_inverter(*task, 3), train_inverter(*task, 4)  # type: ignore[arg-type]

    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.plain.parameters()), next(other.plain.parameters()))
