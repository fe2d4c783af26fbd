"""Texts as an audit counts them: batches for a model, and their tokens in one row.

Legend: B sequences, T positions, D hidden size, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.lab.privacy.config import AuditConfig
from edge_sdk.data.batches import MicroBatch, eval_batches
from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.rows import Row, hold_out, load_rows
from edge_sdk.data.tokenize import Example, ModelLimits, tokenize_rows
from edge_sdk.errors import ConfigError, DataError

# Sequences that pass through the model together.
BATCH = 8
# Fewer tokens say nothing about a share.
LEAST_TOKENS = 50

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Texts:
    """Texts of one side: those that are attacked, or those that the attacker knows."""

    batches: tuple[MicroBatch, ...]
    special: frozenset[int]
    """Tokens that stand for no letters; to recover them is nothing."""

    @cached_property
    def ids_N(self) -> Numbers:  # noqa: N802 - the shape
        """All tokens, batch by batch and row by row."""
        return self.flat([batch.input_ids for batch in self.batches])

    @cached_property
    def sequence_N(self) -> Numbers:  # noqa: N802
        """The text of each token, counted from 0."""
        lengths = np.concatenate([batch.lengths for batch in self.batches])
        return np.repeat(np.arange(len(lengths)), lengths)

    @cached_property
    def place_N(self) -> Numbers:  # noqa: N802
        """The position of each token in its text, from 0."""
        return self.flat(
            [
                np.broadcast_to(np.arange(b.input_ids.shape[1]), b.input_ids.shape)
                for b in self.batches
            ]
        )

    @cached_property
    def is_target_N(self) -> Mask:  # noqa: N802
        """Which tokens carry loss: completions; of plain text all."""
        marks = [
            np.zeros(b.input_ids.shape, np.bool_) if b.labels.ndim == 1 else b.labels != IGNORE
            for b in self.batches
        ]
        return self.flat(marks)

    @cached_property
    def counts_N(self) -> Mask:  # noqa: N802
        """Which tokens count."""
        return ~np.isin(self.ids_N, sorted(self.special))

    def flat(self, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return what stands at real positions of arrays (B, T, ...), one for each batch."""
        return np.concatenate(
            [
                np.asarray(array)[np.arange(array.shape[1]) < batch.lengths[:, None]]
                for batch, array in zip(self.batches, arrays, strict=True)
            ]
        )


@dataclass(frozen=True)
class Sample:
    """What an audit looks at."""

    attacked: Texts
    known: Texts
    source: str
    """Where the known texts come from, in words."""


def make_sample(config: AuditConfig, tokenizer: Any, limits: ModelLimits, pad_id: int) -> Sample:
    """Read the sample and what the attacker knows.

    Raises:
        DataError: a file is missing or malformed, the rows are not for this task, or they are too
            few.
        ConfigError: no file is named.
    """
    if config.data.path is None:
        raise ConfigError("--data: names no file; give texts of the kind that devices hold")
    rows = load_rows(None, config.data)
    if config.public:
        known = load_rows(None, replace(config.data, path=config.public))
        source = "public text: " + ", ".join(config.public)
    else:
        rows, known = _halves(rows, config.seed)
        source = "the other half of the sample"
    special = frozenset(int(token) for token in tokenizer.all_special_ids)
    sides = []
    for found, most in ((rows, config.tokens), (known, config.public_tokens)):
        _check_task(found, config)
        examples = tokenize_rows(found, tokenizer, config.data, limits)
        chosen = _some(examples, most, config.seed)
        sides.append(Texts(tuple(eval_batches(chosen, BATCH, pad_id=pad_id)), special))
    attacked, learned = sides
    counts = int(attacked.counts_N.sum()), int(learned.counts_N.sum())
    if min(counts) < LEAST_TOKENS:
        raise DataError(
            f"{rows[0].where}: {counts[0]} tokens to recover and {counts[1]} to learn from; "
            f"{LEAST_TOKENS} of each are the least, give more data"
        )
    return Sample(attacked, learned, source)


def _halves(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    try:
        return hold_out(rows, 0.5, seed)
    except DataError as error:
        raise DataError(
            f"{rows[0].where}: too few different rows to learn from one half of them; give more, "
            "or --public"
        ) from error


def _check_task(rows: Sequence[Row], config: AuditConfig) -> None:
    has_classes = rows[0].schema == "label"
    if has_classes != (config.task == "sequence-classification"):
        what = "have classes" if has_classes else "have no classes"
        raise DataError(f"{rows[0].where}: the rows {what}, and the task is {config.task}")


def _some(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """Return whole examples in a random order until they have *most* tokens."""
    order = np.random.default_rng(seed).permutation(len(examples))
    found, total = [], 0
    for index in order:
        if total >= most:
            break
        found.append(examples[index])
        total += len(examples[index].input_ids)
    return found


def shares_of(texts: Texts, size: int) -> Shares:
    """Return how often each of *size* tokens occurs among those that count, as shares."""
    counts_V = np.bincount(texts.ids_N[texts.counts_N], minlength=size).astype(np.float64)
    found: Shares = counts_V / max(1.0, counts_V.sum())
    return found
