"""BLEU and NIST of a whole file, as NIST's mteval-v13a counts them; see docs/scores.md."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# As mteval has it: the factor is 1/2 where a text has 2/3 of the references' words.
BETA = math.log(0.5) / math.log(1.5) ** 2
MOST_WORDS = 5
"""Words of the longest stretch that NIST looks at; BLEU's is 4."""

Words = list[str]
Ngram = tuple[str, ...]


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return BLEU, 0..1, by sacrebleu: lower case, tokenised as 13a, the closest length."""
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    streams: Any = [[own[n] if n < len(own) else None for own in references] for n in range(most)]
    # `force` spares a warning about texts whose full stop stands apart, as E2E's may.
    score = BLEU(lowercase=True, tokenize="13a", force=True).corpus_score(hypotheses, streams)
    return float(score.score) / 100


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return NIST with stretches of up to five words.

    A stretch that a text shares with a reference, at most as often as the reference with most of
    them has it, is worth what its last word tells after the others, in bits, over all references.
    """
    tokenize = _tokenizer()
    told = [[tokenize(text) for text in own] for own in references]
    counts: Counter[Ngram] = Counter()
    for own in told:
        for words in own:
            counts.update(_stretches(words))
            counts[()] += len(words)
    bits, totals = [0.0] * MOST_WORDS, [0] * MOST_WORDS
    num_words, usual_words = 0, 0.0
    for text, own in zip(hypotheses, told, strict=True):
        words = tokenize(text)
        num_words += len(words)
        usual_words += sum(map(len, own)) / len(own)
        allowed: Counter[Ngram] = Counter()
        for each in own:
            allowed |= Counter(_stretches(each))
        for ngram, count in (Counter(_stretches(words)) & allowed).items():
            bits[len(ngram) - 1] += count * math.log2(counts[ngram[:-1]] / counts[ngram])
        for size in range(MOST_WORDS):
            totals[size] += max(0, len(words) - size)
    precision = sum(own / total for own, total in zip(bits, totals, strict=True) if total)
    return precision * _brevity(num_words, usual_words)


def _tokenizer() -> Callable[[str], Words]:
    """Return what makes words of a text, in lower case, as mteval-v13a does."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    make: Any = Tokenizer13a
    tokenizer = make()
    return lambda text: str(tokenizer(text.lower())).split()


def _stretches(words: Words) -> Iterator[Ngram]:
    """Yield all stretches of one to `MOST_WORDS` words."""
    for size in range(1, MOST_WORDS + 1):
        for first in range(len(words) - size + 1):
            yield tuple(words[first : first + size])


def _brevity(num_words: int, usual_words: float) -> float:
    if not num_words or not usual_words:
        return 0.0
    return math.exp(BETA * math.log(min(1.0, num_words / usual_words)) ** 2)
