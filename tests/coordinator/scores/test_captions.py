"""METEOR, ROUGE-L and CIDEr are those of MS-COCO's scripts, and of their formulas."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import numpy as np
import pytest

from coordinator.scores import captions
from coordinator.scores.captions import caption_scores
from edge_sdk.errors import DataError
from tests.coordinator.scores.sample import HYPOTHESES, REFERENCES

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
ALL = ("meteor", "rouge_l", "cider")


def test_it_is_what_the_scripts_print() -> None:
    """All three are what the package's own drivers of the scripts say of the same texts."""
    found = caption_scores(ALL, HYPOTHESES, REFERENCES)

    assert found == pytest.approx(
        {"meteor": 0.4019167779685455, "rouge_l": 0.5071583864261913, "cider": 2.757401469780692},
        abs=1e-12,
    )


def test_an_empty_text_is_worth_nothing() -> None:
    """Texts without a word have no score in all three."""
    found = caption_scores(ALL, ["", "..."], [["a cafe"], ["a pub by the river", "a bar"]])

    assert found == {"meteor": 0.0, "rouge_l": 0.0, "cider": 0.0}


def test_the_same_text_is_worth_all_there_is() -> None:
    """Texts that are one of their references have a METEOR and a ROUGE-L of 1."""
    texts, references = (
        ["A pub, by the river.", "cafe"],
        [["a bar", "a pub by the river"], ["Cafe"]],
    )

    assert caption_scores(("meteor", "rouge_l"), texts, references) == {"meteor": 1, "rouge_l": 1}


def test_a_text_is_one_line_whatever_is_in_it() -> None:
    """What else ends a line, or stands between texts, moves no text to another input."""
    texts = ["", "a \u2028 pub\nby the ||| river"]
    references = [["a cafe"], ["a pub by the river"]]

    found = caption_scores(("rouge_l",), texts, references)

    precision, recall, beta = 5 / 8, 5 / 5, 1.2  # each bar is a word
    wanted = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert found["rouge_l"] == pytest.approx(wanted / 2, abs=1e-12)


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    """ROUGE-L joins the best precision and the best recall of a text's references, by beta 1.2."""
    found = caption_scores(("rouge_l",), ["kim eats red apples"], [["kim red apples", "eats now"]])

    precision, recall, beta = 3 / 4, 3 / 3, 1.2
    wanted = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert found["rouge_l"] == pytest.approx(wanted, abs=1e-12)


def test_cider_is_a_cosine_of_rare_words() -> None:
    """CIDEr is ten times the mean clipped cosine of weighted counts, less for other lengths."""
    texts = ["kim sees red birds", "lee sees no birds"]
    references = [["kim sees a red bird", "kim sees birds"], ["lee sees few birds today"]]

    found = caption_scores(("cider",), texts, references)

    assert found["cider"] == pytest.approx(_cider(texts, references), abs=1e-9)


def _cider(texts: list[str], references: list[list[str]]) -> float:
    """Return CIDEr-D by its formula, a vector over all stretches at a time."""
    total = 0.0
    for size in range(1, 5):
        counts = [[_counts(ref, size) for ref in own] for own in references]
        known = sorted(
            {g for own in counts for c in own for g in c}
            | {g for text in texts for g in _counts(text, size)}
        )
        seen = np.array([max(1, sum(any(g in c for c in own) for own in counts)) for g in known])
        weights = math.log(len(texts)) - np.log(seen)
        for text, own in zip(texts, references, strict=True):
            mine = np.array([_counts(text, size)[g] for g in known]) * weights
            for ref in own:
                theirs = np.array([_counts(ref, size)[g] for g in known]) * weights
                norm = np.linalg.norm(mine) * np.linalg.norm(theirs)
                # Lengths are counted in stretches of two words, as the scripts do.
                gap = len(text.split()) - len(ref.split())
                cosine = np.minimum(mine, theirs) @ theirs / norm if norm else 0.0
                total += 10 / 4 * cosine * math.exp(-(gap**2) / (2 * 6**2)) / len(own)
    return float(total) / len(texts)


def _counts(text: str, size: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[n : n + size]) for n in range(len(words) - size + 1))


def test_a_program_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program complains of is in the one line of the error."""
    monkeypatch.setattr(captions, "TOKENIZER", "tokenizer/gone.jar")

    with pytest.raises(DataError, match=r"scores: the tokenizer .*PTBTokenizer"):
        caption_scores(("rouge_l",), ["a"], [["a"]])
