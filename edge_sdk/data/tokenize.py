"""Rows to token ids and targets, with an exact boundary between prompt and completion.

Every row becomes segments, prompts and answers in turn, and each segment is tokenised alone: at
inference the model sees exactly the tokens of the prompt, never one that has swallowed the first
letters of the answer. Batches and padding live in batches.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_sdk.data.chats import chat_samples
from edge_sdk.data.encoding import IGNORE, Encoder, Segment
from edge_sdk.data.isolated.renderer import IsolatedChats, Made
from edge_sdk.data.labels import Classes, find_classes
from edge_sdk.data.rows import DataConfig, Row
from edge_sdk.data.tally import Tally
from edge_sdk.data.templates import ChatTemplate
from edge_sdk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Rows per call into the tokenizer: large enough for its threads, small enough for a device.
ROWS_PER_CALL = 512
SEAM = "prompt and answer have other tokens at once than in turn; trained as the prompt is served"


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised sample, not padded."""

    input_ids: npt.NDArray[np.int32]
    """(T,) token ids."""
    labels: npt.NDArray[np.int32] | int
    """(T,) the ids with IGNORE where there is no loss, not shifted; or the number of the class."""
    where: str
    """Origin for messages: `file:line`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the model can take, from its configuration."""

    vocab_size: int
    """Rows of the embedding; ids must lie below."""
    max_positions: int | None = None
    """Tokens of the longest sequence; None: unlimited."""
    num_labels: int | None = None
    """Classes of the head; None where the model is no classifier."""
    label_names: tuple[str, ...] = ()
    """Names of these classes in the order of their numbers; empty where nobody has said."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What an example may be, and where those are counted that are not."""

    config: DataConfig
    limits: ModelLimits
    max_length: int | None
    tally: Tally

    @property
    def more(self) -> str:
        """Whether a setting of the data could allow more tokens, in words."""
        own, most = self.config.max_length, self.limits.max_positions
        if own is not None and (most is None or own < most):
            return "`max_length` allows more" + ("" if most is None else f", at most {most}")
        return f"more than {most} are not to be had here: the run and its model take no more"


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: ModelLimits,
    tally: Tally | None = None,
    *,
    isolates: bool = False,
) -> list[Example]:
    """Tokenise all *rows*, which are of one schema, and check every one of them.

    Loss is on text, on completions, or on the turns of the assistant. A sequence that starts with
    the token of its beginning (where the tokenizer adds one) has no loss on that. Special tokens
    written out in the data, such as ``<|endoftext|>``, become those tokens. What is too long, or
    bad where bad rows are skipped, is counted in *tally*; without one the log says it. *isolates*:
    the tokenizer's chat template is somebody else's, and runs in a process of its own.

    Raises:
        DataError: The tokenizer is empty or does not fit the model; or a row is too long, holds
            no target, or has an unknown class, and is not to be skipped; or none is left. The
            message names the file and the line.
        ConfigError: ``max_length`` is more than the model can take, or there are more labels than
            the model has classes.
    """
    max_length = _max_length(config, limits)
    check_tokenizer(tokenizer, limits.vocab_size)
    if config.append_eos and tokenizer.eos_token_id is None:
        log.warning("tokenize.no_eos effect=%s", "the model will not learn where to end")
    rules = _Rules(config, limits, max_length, tally or Tally(config.bad_rows))
    isolates = isolates and config.chat_template is None
    chunks = [rows[first : first + ROWS_PER_CALL] for first in range(0, len(rows), ROWS_PER_CALL)]
    if rows and rows[0].schema == "label":
        classes = find_classes(config.labels, limits.label_names, limits.num_labels)
        made = [_label_examples(chunk, tokenizer, classes, rules) for chunk in chunks]
    else:
        with _chats_of(tokenizer, config, isolates=isolates) as chats:
            causal = _Causal(tokenizer, rules, chats)
            made = [causal.examples(chunk) for chunk in chunks]
    examples = list(chain.from_iterable(made))
    if tally is None:
        rules.tally.say()
    if rows and not examples:
        raise rules.tally.refuse_empty("the data")
    return examples


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that has no vocabulary or cannot be that of the model.

    Raises:
        DataError: No text yields a token, or even this plain sentence has ids of
            *vocab_size* or more.
    """
    probe = "The boat leaves at noon."
    ids = Encoder(tokenizer).texts([probe])[0]
    # transformers 5 builds a tokenizer of special tokens only where files are not found.
    if not set(ids) - set(tokenizer.all_special_ids):
        raise DataError("the tokenizer has an empty vocabulary; load it from the model's folder")
    if max(ids) >= vocab_size:
        size = f"the model has {vocab_size} tokens, the tokenizer {len(tokenizer)}"
        raise DataError(f"the tokenizer is not that of the model: {size}")


def _max_length(config: DataConfig, limits: ModelLimits) -> int | None:
    """Return the tokens of the longest sequence allowed, None if any length is."""
    wanted, possible = config.max_length, limits.max_positions
    if wanted is not None and possible is not None and wanted > possible:
        raise ConfigError(f"max_length is {wanted}, but the model takes {possible} tokens")
    return possible if wanted is None else wanted


_Chats = Callable[[Sequence[Row]], Iterator["Made | DataError"]]
"""Makes the samples of chats, or says why a chat has none."""


@contextmanager
def _chats_of(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, isolates: bool
) -> Iterator[_Chats]:
    """Give what makes samples of chats; with *isolates* in a process that ends with it."""
    if isolates:
        with closing(IsolatedChats(tokenizer, config)) as isolated:
            yield isolated
        return
    template = ChatTemplate(tokenizer, config.chat_template_kwargs, config.chat_template)

    def made(rows: Sequence[Row]) -> Iterator[Made | DataError]:
        for row in rows:
            try:
                yield chat_samples(row, template, config)
            except DataError as error:
                yield error

    yield made


class _Causal:
    """Makes the examples of a causal language model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: _Rules, chats: _Chats) -> None:
        self._tokenizer, self._rules, self._chats = tokenizer, rules, chats
        self._encoder = Encoder(tokenizer)

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenise *rows*; a chat may give several examples."""
        samples: list[tuple[Row, list[Segment]]] = []
        for row, made in zip(rows, self._made(rows), strict=True):
            if isinstance(made, DataError):
                self._rules.tally.bad(made)
                continue
            samples += [(row, sample) for sample in made[0]]
            if made[1]:
                reason = f"{row.where}: the chat template leaves out a part of an answer"
                self._rules.tally.add("shortened", reason)
        encoded = self._encoder.samples([sample for _, sample in samples])
        split = {row.where for (row, _), s in zip(samples, encoded, strict=True) if s.is_split}
        for where in [row.where for row in rows if row.where in split]:
            self._rules.tally.add("seams", f"{where}: {SEAM}")
        examples = []
        for (row, _), sample in zip(samples, encoded, strict=True):
            ids, labels = sample.ids, sample.labels
            if row.schema != "chat":  # a chat template writes its own special tokens
                ids, labels = self._with_special(ids, labels, row)
            example = _causal_example(ids, labels, row, self._rules)
            examples += [] if example is None else [example]
        return examples

    def _made(self, rows: Sequence[Row]) -> Iterator[Made | DataError]:
        return self._chats(rows) if rows[0].schema == "chat" else map(self._plain, rows)

    def _plain(self, row: Row) -> Made:
        """Return the segments of the one sample of a row that is no chat."""
        if row.schema == "text":
            return [[Segment.target(row.text)]], False
        prompt = Segment.context(row.prompt + self._rules.config.separator)
        return [[prompt, Segment.target(row.completion)]], False

    def _with_special(
        self, ids: list[int], labels: list[int], row: Row
    ) -> tuple[list[int], list[int]]:
        """Return a text between the tokens of its beginning and its end, none of them twice."""
        bos, eos = self._encoder.bos, self._tokenizer.eos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids, labels = [bos, *ids], [IGNORE, *labels]
        if eos is not None and self._rules.config.append_eos and not self._ends(row, ids, eos):
            ids, labels = [*ids, eos], [*labels, eos]
        return ids, labels

    def _ends(self, row: Row, ids: list[int], eos: int) -> bool:
        """Return whether a text holds its end already; a line end may follow it."""
        text = (row.text or row.completion).rstrip()
        return eos in ids[1:] and text.endswith(str(self._tokenizer.eos_token))


def _causal_example(ids: list[int], labels: list[int], row: Row, rules: _Rules) -> Example | None:
    """Return the example, cut where that is asked for; None where it is left out and counted."""
    kept = _kept(len(ids), row, rules)
    if not kept:
        return None
    held, is_cut = f"{len(ids)} tokens", kept < len(ids)
    ids, labels = ids[:kept], labels[:kept]
    # Nothing predicts the first token, so its label never counts.
    if all(label == IGNORE for label in labels[1:]):
        if is_cut:
            reason = f"holds no target among its first {kept} of {held}"
            rules.tally.add("dropped", f"{row.where}: {reason}")
        else:
            rules.tally.bad(DataError(f"{row.where}: holds no target among its {held}"))
        return None
    if is_cut:
        rules.tally.add("cut", f"{row.where}: has {held}, kept are the first {kept}")
    return _example(ids, np.array(labels, dtype=np.int32), row, rules)


def _example(
    ids: list[int], labels: npt.NDArray[np.int32] | int, row: Row, rules: _Rules
) -> Example | None:
    """Return the example if the model knows all of its tokens; None where it is skipped."""
    if max(ids) >= rules.limits.vocab_size:
        known = f"the model knows ids below {rules.limits.vocab_size}"
        rules.tally.bad(DataError(f"{row.where}: gives token {max(ids)}, but {known}"))
        return None
    return Example(np.array(ids, dtype=np.int32), labels, row.where)


def _kept(num_tokens: int, row: Row, rules: _Rules) -> int:
    """Return how many of a row's tokens stay, 0 where it is dropped, or refuse the data."""
    rules.tally.lengths.append(num_tokens)
    if rules.max_length is None or num_tokens <= rules.max_length:
        return num_tokens
    if rules.config.too_long == "cut":
        return rules.max_length
    reason = f"{row.where}: has {num_tokens} tokens, allowed are {rules.max_length}"
    if rules.config.too_long == "drop":
        rules.tally.add("dropped", reason)
        return 0
    remedy = "`too_long: cut` keeps the first ones, `drop` leaves such rows out"
    raise DataError(f"{reason}; {remedy}; {rules.more}")


def _label_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, classes: Classes, rules: _Rules
) -> list[Example]:
    """Tokenise rows for a classifier, with the special tokens that its tokenizer adds."""
    texts = [row.text for row in rows]
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    examples = []
    for row, ids in zip(rows, encoded, strict=True):
        try:
            if not ids:
                raise DataError(f"{row.where}: text gives no token")
            number = classes.number(row)
        except DataError as error:
            rules.tally.bad(error)
            continue
        example = _label_example(ids, number, row, tokenizer, rules)
        examples += [] if example is None else [example]
    return examples


def _label_example(
    ids: list[int], number: int, row: Row, tokenizer: PreTrainedTokenizerBase, rules: _Rules
) -> Example | None:
    """Return the example, cut where that is asked for; None where it is left out and counted."""
    num_tokens = len(ids)
    kept = _kept(num_tokens, row, rules)
    if not kept:
        return None
    if kept < num_tokens:
        # The tokenizer cuts, not we: a closing [SEP] must survive.
        ids = tokenizer(row.text, truncation=True, max_length=kept, verbose=False)["input_ids"]
        rules.tally.add("cut", f"{row.where}: has {num_tokens} tokens, kept are {len(ids)}")
    return _example(ids, number, row, rules)
