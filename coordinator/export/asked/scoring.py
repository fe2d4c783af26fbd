"""Scores of what a run has learned, by what its whole model writes or which classes it finds.

What each score is and who counts it: `coordinator/scores`. What computes is an engine, a trainer or
a model of `trained.py`. This makes prompts and references of rows, and texts of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from coordinator.config.run import ServeConfig
from coordinator.engine.whole import IntArray, Manner
from coordinator.export.asked.texts import Prompting, text_ends
from coordinator.scores.measures import require_programs, score_classes, score_texts
from edge_sdk.data.batches import MicroBatch
from edge_sdk.data.rows import DataConfig, Row, load_rows
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.model.layout import usable_positions
from edge_sdk.model.weights import ModelSource


class WholeModel(Protocol):
    """What computes all of a run's model."""

    def predict_whole(self, micro: MicroBatch) -> IntArray:
        """Return the most likely class (B,) of each sequence."""

    def continue_texts(self, prompts: Sequence[Sequence[int]], manner: Manner) -> list[list[int]]:
        """Return the tokens that the model adds to each prompt."""


class Written(NamedTuple):
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    references: tuple[str, ...]
    """What people wrote."""


class Scoring(Protocol):
    """The scores of `evaluation.scores` on one file."""

    written: list[Written]
    """What was written for the last scores; nothing where classes are scored."""

    def is_due(self, rounds_done: int, total_rounds: int) -> bool:
        """Return whether a run counts scores after so many rounds, where it evaluates anyway."""

    def score(self, model: WholeModel) -> dict[str, float]:
        """Return the scores of a model, by name."""


class NoScoring:
    """Nothing is to be scored."""

    def __init__(self) -> None:
        self.written: list[Written] = []

    def is_due(self, rounds_done: int, total_rounds: int) -> bool:
        """Return False; see `Scoring`."""
        return False

    def score(self, model: WholeModel) -> dict[str, float]:
        """Return nothing; see `Scoring`."""
        return {}


class ClassScoring(NoScoring):
    """The scores of a classifier; its predictions cost another forward pass."""

    def __init__(self, config: ServeConfig, batches: Sequence[MicroBatch]) -> None:
        super().__init__()
        self._names, self._num_classes = config.evaluation.scores, len(config.label_names)
        self._batches = batches

    def is_due(self, rounds_done: int, total_rounds: int) -> bool:
        """Return True; see `Scoring`."""
        return True

    def score(self, model: WholeModel) -> dict[str, float]:
        """Return the scores over all rows; see `Scoring`."""
        true: list[int] = []
        found: list[int] = []
        for batch in self._batches:
            true += np.asarray(batch.labels).tolist()
            found += model.predict_whole(batch).tolist()
        return score_classes(self._names, true, found, self._num_classes)


class TextScoring(NoScoring):
    """The scores of a language model's texts on a file of prompts and completions.

    All completions of one prompt, wherever they stand in the file, are its references.

    Args:
        config: The run.
        source: Its base.
        tokenizer: Its tokenizer.
        data: The file.

    Raises:
        ConfigError: a program that counts a score is missing, or a prompt is too long.
        DataError: the file cannot be read, or holds no prompts with completions.
    """

    def __init__(
        self, config: ServeConfig, source: ModelSource, tokenizer: Any, data: DataConfig
    ) -> None:
        super().__init__()
        evaluation, how = config.evaluation, config.evaluation.generate
        require_programs(evaluation.scores)
        self._names, self._every = evaluation.scores, how.every_rounds
        self._prompting = Prompting(config, tokenizer, "completion")
        self._manner = Manner(
            max_new_tokens=how.max_new_tokens,
            num_beams=how.num_beams,
            length_penalty=how.length_penalty,
            no_repeat_ngram_size=how.no_repeat_ngram_size,
            batch_size=how.batch_size,
            ends=tuple(text_ends(source).union(self._prompting.ends)),
        )
        self._references = references(load_rows(None, data))
        self._ids = [self._prompting.ids(prompt) for prompt in self._references]
        most = usable_positions(source.config, source.task) - 1
        if (longest := max(map(len, self._ids))) > most:
            raise ConfigError(
                f"evaluation.scores: a prompt has {longest} tokens, the model takes {most}"
            )

    def is_due(self, rounds_done: int, total_rounds: int) -> bool:
        """Return whether texts are written after so many rounds; see `Scoring`."""
        is_last = rounds_done == total_rounds
        return is_last or (self._every is not None and rounds_done % self._every == 0)

    def score(self, model: WholeModel) -> dict[str, float]:
        """Let the model write, and count; see `Scoring`."""
        added = model.continue_texts(self._ids, self._manner)
        # A text is one line, as the programs that count have it.
        texts = [" ".join(self._prompting.text(ids).split()) for ids in added]
        right = list(self._references.values())
        named = zip(self._references, texts, right, strict=True)
        self.written = [Written(*each) for each in named]
        return score_texts(self._names, texts, right)


def references(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Return the completions of each prompt, in the order in which they stand there.

    Raises:
        DataError: the rows are no prompts with completions.
    """
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if row.schema != "completion":
            raise DataError(
                f"{row.where}: scores of texts need rows with prompt and completion, got "
                f"{row.schema}"
            )
        found[row.prompt] = (*found.get(row.prompt, ()), row.completion)
    return found


def make_scoring(
    config: ServeConfig,
    source: ModelSource,
    tokenizer: Any,
    batches: Sequence[MicroBatch],
    file: str | tuple[str, ...] | None = None,
) -> Scoring:
    """Return what a run scores on a file.

    Args:
        config: The run.
        source: Its base.
        tokenizer: Its tokenizer.
        batches: The file as tokens; empty: there is none.
        file: The file; None: `evaluation.data.path`.

    Raises:
        ConfigError, DataError: as `TextScoring`.
    """
    if not config.evaluation.scores or not batches:
        return NoScoring()
    if config.label_names:
        return ClassScoring(config, batches)
    data = config.evaluation.data
    return TextScoring(
        config, source, tokenizer, data if file is None else replace(data, path=file)
    )


def scoring_of(
    config: ServeConfig,
    source: ModelSource,
    tokenizer: Any,
    batches: Sequence[MicroBatch],
    test_batches: Sequence[MicroBatch],
) -> Scoring:
    """Return the scoring on a run's own file; what keeps the test file from it is said now, too.

    Args:
        config: The run.
        source: Its base.
        tokenizer: Its tokenizer.
        batches: Its own file as tokens; empty: there is none.
        test_batches: Its test file, likewise.

    Raises:
        ConfigError, DataError: as `TextScoring`.
    """
    make_scoring(config, source, tokenizer, test_batches, config.evaluation.test_file)
    return make_scoring(config, source, tokenizer, batches)
