"""Which scores of a model are counted, beside its loss, and how its texts are written for them.

What each score is: docs/scores.md. This knows no library that counts one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Score = Literal["bleu", "nist", "meteor", "rouge_l", "cider", "f1", "f1_macro", "mcc"]


class ScoreKind(NamedTuple):
    """A score as people know it."""

    title: str
    meaning: str
    is_of_text: bool
    """Whether it compares texts with references; else classes with classes."""
    factor: float = 1.0
    """What a table multiplies it by, as the papers do."""
    digits: int = 4
    """Digits behind the point in a table."""

    def text(self, value: float) -> str:
        """Return a value as tables of papers have it."""
        return f"{value * self.factor:.{self.digits}f}"


SCORES: dict[str, ScoreKind] = {
    "bleu": ScoreKind("BLEU", "BLEU of the texts against all references", True, 100, 2),
    "nist": ScoreKind("NIST", "NIST of the texts against all references", True),
    "meteor": ScoreKind("METEOR", "METEOR 1.5 of the texts against all references", True),
    "rouge_l": ScoreKind("ROUGE-L", "ROUGE-L of the texts against all references", True, 100, 2),
    "cider": ScoreKind("CIDEr", "CIDEr-D of the texts against all references", True),
    "f1": ScoreKind("F1", "F1 of the second of two classes", False, 100, 2),
    "f1_macro": ScoreKind("macro F1", "Mean of the F1 of all classes", False, 100, 2),
    "mcc": ScoreKind("MCC", "Matthews correlation of predicted and true classes", False),
}
"""By name in `evaluation.scores`; values are those of the programs that define them."""


def scores_in(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the scores among some numbers, in their order."""
    return {name: numbers[name] for name in SCORES if name in numbers}


def said(numbers: Mapping[str, float]) -> str:
    """Return the scores among some numbers in a line; empty where there are none."""
    found = scores_in(numbers).items()
    return ", ".join(f"{SCORES[name].title} {SCORES[name].text(value)}" for name, value in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """How a model writes the texts that scores of texts compare with references."""

    max_new_tokens: int = 64
    """Most tokens of a text."""
    num_beams: int = 1
    """Beams of the search; 1 takes the most likely token each time."""
    length_penalty: float = 1.0
    """Power of a beam's length by which its log-probability is divided; above 0 favours long
    texts."""
    no_repeat_ngram_size: int = 0
    """Tokens of a run that may stand in a prompt and its text only once; 0: no rule."""
    batch_size: int = 16
    """Prompts that are continued together."""
    every_rounds: int | None = None
    """Rounds between two evaluations that write texts: devices wait meanwhile. None: only the last
    round of the run."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.no_repeat_ngram_size < 0:
            value = self.no_repeat_ngram_size
            raise ValueError(f"no_repeat_ngram_size must be 0 or more, got {value}")
        if self.every_rounds is not None and self.every_rounds < 1:
            raise ValueError(f"every_rounds must be at least 1, got {self.every_rounds}")


def check_scores(scores: tuple[str, ...], *, num_classes: int) -> None:
    """Refuse scores that a model cannot have.

    Args:
        scores: Their names.
        num_classes: Classes of a classifier; 0 for a language model.

    Raises:
        ValueError: one of them is of another task, or stands there twice.
    """
    if len(set(scores)) < len(scores):
        raise ValueError(f"scores must name each once, got {list(scores)}")
    for name in scores:
        if SCORES[name].is_of_text == bool(num_classes):
            task = "sequence-classification" if num_classes else "causal-lm"
            fitting = ", ".join(n for n, k in SCORES.items() if k.is_of_text != bool(num_classes))
            raise ValueError(f"scores: {name} is no score of {task}, whose are {fitting}")
    if "f1" in scores and num_classes != 2:
        raise ValueError(f"scores: f1 is of two classes, not of {num_classes}; use f1_macro")
