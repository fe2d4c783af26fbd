"""Which program counts which score, whether it is here, and what it says."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from coordinator.config.scoring import SCORES
from coordinator.scores.captions import caption_scores
from coordinator.scores.classes import MEASURES, IntArray, confusion
from coordinator.scores.mteval import bleu, nist
from edge_sdk.errors import ConfigError, DataError

MTEVAL = {"bleu": bleu, "nist": nist}
CAPTIONS = ("meteor", "rouge_l", "cider")


def require_programs(scores: Sequence[str]) -> None:
    """Fail before a run begins where a score could not be counted at its end.

    Raises:
        ConfigError: a package or Java is missing; the message says how to get it.
    """
    for package, own in (("sacrebleu", tuple(MTEVAL)), ("pycocoevalcap", CAPTIONS)):
        wanted = [name for name in scores if name in own]
        if wanted and find_spec(package) is None:
            raise ConfigError(
                f"scores: {', '.join(wanted)} needs {package}, which is missing: "
                "pip install 'edgesplit[scores]'"
            )
    wanted = [name for name in scores if name in CAPTIONS]
    if wanted and shutil.which("java") is None:
        raise ConfigError(
            f"scores: {', '.join(wanted)} needs Java: the tokenizer and METEOR are Java programs; "
            "install a JRE so that `java` is found, or count bleu and nist alone"
        )


def score_texts(
    scores: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return scores of texts over a whole file.

    Args:
        scores: Names of scores of texts.
        hypotheses: What a model wrote, a text for each input.
        references: What people wrote for it, at least one text each.

    Raises:
        DataError: there are no texts, an input has no reference, or a program has failed.
    """
    if not hypotheses:
        raise DataError("scores: there are no texts")
    if len(hypotheses) != len(references):
        raise DataError(f"scores: {len(hypotheses)} texts, but {len(references)} inputs")
    for number, own in enumerate(references, start=1):
        if not any(text.strip() for text in own):
            raise DataError(f"scores: input {number} has no reference")
    found = {
        name: count(hypotheses, references) for name, count in MTEVAL.items() if name in scores
    }
    if any(name in CAPTIONS for name in scores):
        found |= caption_scores(scores, hypotheses, references)
    return {name: found[name] for name in SCORES if name in found}


def score_classes(
    scores: Sequence[str], true: Sequence[int], found: Sequence[int], num_classes: int
) -> dict[str, float]:
    """Return scores of classes, by their numbers.

    Raises:
        DataError: there are none.
    """
    if not true:
        raise DataError("scores: there are no rows")
    numbers: tuple[IntArray, IntArray] = (np.array(true), np.array(found))
    counts_CC = confusion(*numbers, num_classes)
    return {name: MEASURES[name](counts_CC) for name in SCORES if name in scores}
