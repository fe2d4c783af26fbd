"""The nearest state names the token, where states are the tokens' own."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.lab.privacy.nearest import Vocabulary, nearest_ranks, nearest_tokens, shift_of
from coordinator.lab.privacy.score import recovered
from coordinator.lab.privacy.states import Walk
from tests.coordinator.lab.privacy.samples import random_texts, slice_of
from tests.tiny import VOCAB


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_embeddings_alone_tell_every_token(family: str) -> None:
    """What enters the first block is a text: nearest embedding gives back all of it."""
    model, texts, known = slice_of(family), random_texts(0), random_texts(1)
    table = Vocabulary(model, 0)
    offsets_TD = table.place_offsets(14)
    states = texts.flat(Walk(model, texts.batches).states) - offsets_TD[texts.place_N]
    learned = known.flat(Walk(model, known.batches).states) - offsets_TD[known.place_N]

    shift_D = shift_of(learned, known.ids_N, table.embeddings_VD)
    ranks_N = nearest_ranks(states - shift_D, texts.ids_N, table.embeddings_VD)

    found = recovered(ranks_N, texts)
    assert {kind: (own.top1, own.exact) for kind, own in found.items()} == {
        "prompts": (1.0, 1.0),
        "completions": (1.0, 1.0),
    }
    assert np.abs(shift_D).max() < 1e-5
    assert (nearest_tokens(states, table.embeddings_VD, 3)[:, 0] == texts.ids_N).all()


def test_shuffled_states_are_at_chance() -> None:
    """States of other tokens tell no more than chance: the attack has no way around them."""
    model, texts = slice_of("llama"), random_texts(0, 200)
    table = Vocabulary(model, 0)
    states = texts.flat(Walk(model, texts.batches).states)
    order = np.random.default_rng(0).permutation(len(states))

    ranks_N = nearest_ranks(states[order], texts.ids_N, table.embeddings_VD)

    found = recovered(ranks_N, texts)["completions"]
    spread = np.sqrt(1 / VOCAB / found.tokens)
    assert found.top1 < 1 / VOCAB + 4 * spread
    assert abs(found.top10 - 10 / VOCAB) < 4 * np.sqrt(10) * spread


def test_the_vocabulary_walks_as_texts_do() -> None:
    """After each block a token behind the first one has the state that it has in such a text."""
    model = slice_of("llama")
    table = Vocabulary(model, 0)
    texts = random_texts(0)
    walk = Walk(model, texts.batches)

    for split in (1, 3):
        table.to(split)
        walk.to(split)

        second = walk.states[0][:, 1]
        ids = texts.batches[0].input_ids[:, 1]
        np.testing.assert_allclose(table.states_VD[ids], second, rtol=1e-4, atol=1e-4)
