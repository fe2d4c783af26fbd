"""BLEU and NIST are those of the E2E challenge's programs, and of others where they agree."""

from __future__ import annotations

import math

import pytest
from nltk.translate.bleu_score import corpus_bleu
from nltk.translate.nist_score import corpus_nist

from coordinator.scores.mteval import bleu, nist
from tests.coordinator.scores.sample import HYPOTHESES, REFERENCES

# One text has two words. mteval has no stretch of three there; the challenge's version in Python
# counts one less than none, and says 0.3658 and 5.1738 with that text.
LONG = [n for n, text in enumerate(HYPOTHESES) if text != "Cheap."]


def test_it_is_what_the_challenge_prints() -> None:
    """Both are what pymteval of the challenge's e2e-metrics counts on the same texts."""
    hypotheses, references = [HYPOTHESES[n] for n in LONG], [REFERENCES[n] for n in LONG]

    found = bleu(hypotheses, references), nist(hypotheses, references)

    assert found == pytest.approx((0.39911419786898783, 5.081917705638357), abs=1e-12)


def test_bleu_is_that_of_nltk() -> None:
    """BLEU is NLTK's on the words that mteval makes of these texts."""
    words = {
        "A pub, near-by: 3.5 stars!": "a pub , near-by : 3.5 stars !",
        "A pub near by has 3.5 stars (or more).": "a pub near by has 3.5 stars ( or more ) .",
        "There is a pub, near-by.": "there is a pub , near-by .",
        "A cafe & a bar in 2-3 places": "a cafe & a bar in 2 - 3 places",
        "A cafe and a bar in 2-3 places.": "a cafe and a bar in 2 - 3 places .",
    }
    pub, one, other, cafe, third = words

    found = bleu([pub, cafe], [[one, other], [third]])

    told = {text: parted.split() for text, parted in words.items()}
    right = [[told[one], told[other]], [told[third]]]
    assert found == pytest.approx(corpus_bleu(right, [told[pub], told[cafe]]), abs=1e-12)


def test_nist_is_that_of_nltk_with_one_reference() -> None:
    """With one reference each NIST is NLTK's; with several NLTK takes the best one, we all."""
    hypotheses = ["the pub is by the river bank", "a cheap cafe is in the city centre"]
    references = ["the pub is near the river", "in the city centre is a cheap cafe to eat"]

    found = nist(hypotheses, [[text] for text in references])

    right = [[text.split()] for text in references]
    assert found == pytest.approx(corpus_nist(right, [t.split() for t in hypotheses]), abs=1e-12)


def test_nist_counts_all_references_at_once() -> None:
    """A stretch counts as often as in the reference with most of it, and tells what all say."""
    found = nist(["a b a"], [["a b", "a c a"]])

    # Five words in the references: a three times, b and c once; a b, a c and c a once each. The
    # text's a counts twice, as in `a c a`, its b once, its `a b` once; its `b a` is in none.
    one = 2 * math.log2(5 / 3) + math.log2(5 / 1)
    two = math.log2(3 / 1)
    assert found == pytest.approx(one / 3 + two / 2, abs=1e-12)  # longer than 2.5 words: no penalty


def test_a_text_of_two_thirds_is_worth_half() -> None:
    """NIST's penalty is 1/2 where the texts have 2/3 of the references' words."""
    words = ["the", "pub", "by", "the", "river", "is", "cheap", "and", "good"]

    found = nist([" ".join(words[:6])], [[" ".join(words)]])

    counts = {size: 6 - size + 1 for size in range(1, 6)}
    bits = {1: 2 * math.log2(9 / 2) + 4 * math.log2(9), 2: 2 * math.log2(2 / 1)}
    whole = bits[1] / counts[1] + bits[2] / counts[2]
    assert found == pytest.approx(whole / 2, abs=1e-12)


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_text_is_worth_nothing(text: str) -> None:
    """Texts without a word have a BLEU and a NIST of 0."""
    assert (bleu([text], [["a pub"]]), nist([text], [["a pub"]])) == (0.0, 0.0)


def test_a_word_is_worth_its_unigrams() -> None:
    """Of a text of one word only stretches of one word count."""
    assert nist(["pub"], [["pub"]]) == 0.0  # the only word there is tells nothing
    assert nist(["pub"], [["pub bar"]]) == pytest.approx(
        math.exp(math.log(0.5) * (math.log(1 / 2) / math.log(1.5)) ** 2), abs=1e-12
    )


def test_the_same_text_has_a_bleu_of_one() -> None:
    """Texts that are one of their references, in other letters, have a BLEU of 1."""
    assert bleu([own[-1].upper() for own in REFERENCES], REFERENCES) == pytest.approx(1.0)
