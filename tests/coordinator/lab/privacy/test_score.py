"""Shares of tokens and of whole texts, prompts and completions apart."""

from __future__ import annotations

import numpy as np

from coordinator.lab.privacy.score import by_frequency, ranks_of, recovered
from coordinator.lab.privacy.texts import shares_of
from tests.coordinator.lab.privacy.samples import PROMPT, random_texts
from tests.tiny import VOCAB


def test_a_wrong_token_spoils_one_text_of_its_kind() -> None:
    """Special tokens do not count, the kinds are counted apart, and an exact text has no error."""
    texts = random_texts(0, 8)
    ranks = np.zeros(len(texts.ids_N), np.int64)
    ranks[texts.place_N == 0] = 50  # what begins every text is nothing to be recovered
    ranks[(texts.sequence_N == 2) & (texts.place_N == 1)] = 3
    ranks[(texts.sequence_N == 2) & (texts.place_N == PROMPT)] = 30

    found = recovered(ranks, texts)

    prompts, completions = found["prompts"], found["completions"]
    assert prompts.tokens == 8 * (PROMPT - 1)
    assert prompts.sentences == completions.sentences == 8
    assert (prompts.top1, prompts.top10) == (1 - 1 / prompts.tokens, 1.0)
    assert completions.top1 == completions.top10 == 1 - 1 / completions.tokens
    assert prompts.exact == completions.exact == 7 / 8


def test_equal_scores_are_no_recovery() -> None:
    """Who holds all tokens for as likely has named none of them."""
    scores = np.zeros((1, VOCAB), np.float32)

    assert ranks_of(scores, np.array([7])).tolist() == [VOCAB - 1]


def test_frequency_is_a_baseline() -> None:
    """It names the most frequent token everywhere: as often as that occurs, and no text."""
    texts, known = random_texts(0, 60), random_texts(1, 60)
    shares = shares_of(known, VOCAB)

    found = by_frequency(shares, texts)["completions"]

    counted = texts.ids_N[texts.counts_N & texts.is_target_N]
    assert found.top1 == np.mean(counted == shares.argmax())
    assert found.exact == 0.0
    assert shares[:4].sum() == 0.0
    assert abs(shares.sum() - 1.0) < 1e-12
