"""Texts to train on where there are none: words of the model's own, in an order to be learned.

They show from which rate on training breaks down, and little of which rate is best for real texts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Words that occur, how many of them may follow each, words of a text, and texts.
NUM_WORDS, NUM_NEXT, TEXT_WORDS, NUM_TEXTS = 64, 4, 24, 256


def generated_rows(tokenizer: Any, label_names: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """Return rows of text and, for a classifier, a label that the first word decides."""
    draw = np.random.default_rng(seed)
    words = _words(tokenizer, draw)
    following = draw.integers(0, len(words), (len(words), NUM_NEXT))
    rows = []
    for _ in range(NUM_TEXTS):
        at = int(draw.integers(len(words)))
        row: dict[str, Any] = {"label": label_names[at % len(label_names)]} if label_names else {}
        text = [words[at]]
        for _ in range(TEXT_WORDS - 1):
            at = int(following[at, draw.integers(NUM_NEXT)])
            text.append(words[at])
        rows.append({**row, "text": " ".join(text)})
    return rows


def _words(tokenizer: Any, draw: np.random.Generator) -> list[str]:
    """Return words that the tokenizer knows, as far as it has any."""
    special = set(tokenizer.all_special_ids)
    found: dict[str, None] = {}
    for token in draw.permutation(len(tokenizer))[: 40 * NUM_WORDS]:
        word = tokenizer.decode([int(token)]).strip() if int(token) not in special else ""
        if word.isprintable() and word.isalnum():
            found[word] = None
        if len(found) == NUM_WORDS:
            break
    return list(found) or ["a", "b"]
