"""Gradients name the targets, as docs/security.md says."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.lab.privacy.labels import find_labels, send_top
from coordinator.lab.privacy.states import Walk
from tests.coordinator.lab.privacy.samples import random_texts, slice_of
from tests.tiny import BLOCKS, CLASSES, task_of


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen3", "gemma3_text", "opt", "bert", "roberta"]
)
def test_gradients_in_float32_name_every_target(family: str) -> None:
    """No target is hidden by a norm, a soft cap, an untied head or a pooled state."""
    classes = task_of(family) == "sequence-classification"
    model, texts = slice_of(family), random_texts(0, classes=classes)
    walk = Walk(model, texts.batches)
    walk.to(BLOCKS)

    for hidden, batch in zip(walk.states, texts.batches, strict=True):
        sent = send_top(model, hidden, batch, "float32")
        ranks = find_labels(model, sent, batch)

        assert ranks is not None
        assert len(ranks) == batch.num_targets == len(sent.labels)
        assert not ranks.any()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradients_of_other_texts_tell_nothing(family: str) -> None:
    """A shuffled gradient names targets no oftener than chance does."""
    classes = task_of(family) == "sequence-classification"
    model, texts = slice_of(family), random_texts(0, 120, classes=classes)
    walk = Walk(model, texts.batches)
    walk.to(BLOCKS)
    draw, hits, total = np.random.default_rng(0), 0, 0

    for hidden, batch in zip(walk.states, texts.batches, strict=True):
        sent = send_top(model, hidden, batch, "float32")
        order = draw.permutation(len(sent.labels))
        ranks = find_labels(model, sent._replace(labels=sent.labels[order]), batch)
        assert ranks is not None
        hits += int((ranks == 0).sum())
        total += len(ranks)

    chance = 1 / CLASSES if classes else float(np.sum(_shares(texts.ids_N[texts.is_target_N]) ** 2))
    assert hits / total < chance + 4 * np.sqrt(chance / total)


def _shares(ids: np.ndarray) -> np.ndarray:
    _, counts = np.unique(ids, return_counts=True)
    found: np.ndarray = counts / counts.sum()
    return found


def test_few_bits_hide_little() -> None:
    """Eight bits of a gradient name all targets of a tiny model, two bits most of them."""
    model, texts = slice_of("llama"), random_texts(0)
    walk = Walk(model, texts.batches)
    walk.to(BLOCKS)
    shares = {}

    for codec in ("bfloat16", "int8", "int2"):
        sent = send_top(model, walk.states[0], texts.batches[0], codec)
        ranks = find_labels(model, sent, texts.batches[0])
        assert ranks is not None
        shares[codec] = float(np.mean(ranks == 0))

    assert shares["bfloat16"] == shares["int8"] == 1.0
    assert shares["int2"] > 0.5
