"""Rows to token ids and targets, with an exact boundary between prompt and completion.

Every row becomes segments, each wholly target or wholly context, and each segment is tokenised
alone: at inference the model sees exactly the tokens of the prompt, never one that has swallowed
the first letters of the answer. Batches and padding live in batches.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.rows import DataConfig, Row
from edge_sdk.data.tally import Tally
from edge_sdk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORE = -100
"""Label of a token that carries no loss, as in PyTorch and transformers."""
# Rows per call into the tokenizer: large enough for its threads, small enough for a device.
ROWS_PER_CALL = 512


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised sample, not padded."""

    input_ids: npt.NDArray[np.int32]
    """(T,) token ids."""
    labels: npt.NDArray[np.int32] | int
    """(T,) the ids with IGNORE where there is no loss, not shifted; or the number of the class."""
    where: str
    """Origin for messages: `file:line`."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is target throughout or context throughout."""

    text: str
    is_target: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the model can take, from its configuration."""

    vocab_size: int
    """Rows of the embedding; ids must lie below."""
    max_positions: int | None = None
    """Tokens of the longest sequence; None: unlimited."""
    num_labels: int | None = None
    """Classes of the head; None where the model is no classifier."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What an example may be, and where those are counted that are not."""

    config: DataConfig
    limits: ModelLimits
    max_length: int | None
    tally: Tally


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: ModelLimits,
    tally: Tally | None = None,
) -> list[Example]:
    """Tokenise all *rows*, which are of one schema, and check every one of them.

    Loss is on text, on completions, or on the turns of the assistant. A sequence that starts with
    the token of its beginning (where the tokenizer adds one) has no loss on that. Special tokens
    written out in the data, such as ``<|endoftext|>``, become those tokens. What is too long, or
    bad where bad rows are skipped, is counted in *tally*; without one the log says it.

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
    examples: list[Example] = []
    for first in range(0, len(rows), ROWS_PER_CALL):
        chunk = rows[first : first + ROWS_PER_CALL]
        if chunk[0].schema == "label":
            examples += _label_examples(chunk, tokenizer, rules)
        else:
            examples += _causal_examples(chunk, tokenizer, rules)
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
    ids = _encode([probe], tokenizer)[0]
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


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of each text, without special tokens around it."""
    if not texts:
        return []
    # verbose=False: we judge lengths ourselves, with the line at hand.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text: the beginning-of-sequence token or nothing."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _segments(row: Row, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[Segment]:
    """Return the segments of a causal row in their order."""
    if row.schema == "text":
        return [Segment(row.text, is_target=True)]
    if row.schema == "completion":
        prompt = Segment(row.prompt + config.separator, is_target=False)
        return [prompt, Segment(row.completion, is_target=True)]
    return chat_segments(row, tokenizer)


def chat_segments(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Render a chat with the tokenizer's template; the turns of the assistant are targets.

    A turn begins where the template asks for an answer and ends where it ends the turn, so the
    model also learns to stop.

    Raises:
        DataError: No template, the template refuses the chat, or it writes an earlier turn
            differently once a later one follows, which leaves no exact boundary.
    """
    whole = _render(row, len(row.messages), tokenizer)
    segments, done = [], 0
    for index in row.targets:
        before = _render(row, index, tokenizer, ask=True) if index else ""
        after = _render(row, index + 1, tokenizer)
        if not (whole.startswith(after) and after.startswith(before) and done <= len(before)):
            what = f"the chat template rewrites turn {index + 1}"
            raise DataError(f"{row.where}: {what} when others follow; train on prompt + completion")
        segments.append(Segment(whole[done : len(before)], is_target=False))
        segments.append(Segment(whole[len(before) : len(after)], is_target=True))
        done = len(after)
    # No target can see the turns after the assistant's last one: they are left out.
    return segments


def _render(
    row: Row, num_turns: int, tokenizer: PreTrainedTokenizerBase, *, ask: bool = False
) -> str:
    """Return the first turns of a chat as text; *ask* opens the turn of the assistant."""
    from jinja2 import TemplateError  # comes with the templates that need it

    if not tokenizer.chat_template:
        raise DataError(f"{row.where}: has messages, but the tokenizer has no chat template")
    turns: list[dict[str, Any]] = list(row.messages[:num_turns])
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        reason = str(error)[:200]
        raise DataError(f"{row.where}: the chat template refuses it: {reason}") from error
    return str(text)


def _causal_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rules: _Rules
) -> list[Example]:
    """Tokenise rows for a causal language model."""
    config = rules.config
    pieces: list[tuple[Row, list[Segment]]] = []
    for row in rows:
        try:
            pieces.append((row, _segments(row, tokenizer, config)))
        except DataError as error:
            rules.tally.bad(error)
    encoded = iter(_encode([part.text for _, parts in pieces for part in parts], tokenizer))
    is_chat = rows[0].schema == "chat"  # a chat template writes its own special tokens
    before = [] if is_chat else _bos(tokenizer)
    eos = tokenizer.eos_token_id if config.append_eos and not is_chat else None
    after = [] if eos is None else [eos]
    examples = []
    for row, parts in pieces:
        ids, labels = list(before), [IGNORE] * len(before)
        for part in parts:
            tokens = next(encoded)
            ids += tokens
            labels += tokens if part.is_target else [IGNORE] * len(tokens)
        example = _causal_example(ids + after, labels + after, row, rules)
        examples += [] if example is None else [example]
    return examples


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
    if rules.max_length is None or num_tokens <= rules.max_length:
        return num_tokens
    if rules.config.too_long == "cut":
        return rules.max_length
    reason = f"{row.where}: has {num_tokens} tokens, allowed are {rules.max_length}"
    if rules.config.too_long == "drop":
        rules.tally.add("dropped", reason)
        return 0
    remedy = "`too_long: cut` keeps the first ones, `drop` leaves such rows out"
    raise DataError(f"{reason}; {remedy}, `max_length` allows more")


def _label_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rules: _Rules
) -> list[Example]:
    """Tokenise rows for a classifier, with the special tokens that its tokenizer adds."""
    texts = [row.text for row in rows]
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    examples = []
    for row, ids in zip(rows, encoded, strict=True):
        example = _label_example(ids, row, tokenizer, rules)
        examples += [] if example is None else [example]
    return examples


def _label_example(
    ids: list[int], row: Row, tokenizer: PreTrainedTokenizerBase, rules: _Rules
) -> Example | None:
    """Return the example, cut where that is asked for; None where it is left out and counted."""
    num_tokens = len(ids)
    try:
        if not ids:
            raise DataError(f"{row.where}: text gives no token")
        number = class_number(row, rules.config, rules.limits)
    except DataError as error:
        rules.tally.bad(error)
        return None
    kept = _kept(num_tokens, row, rules)
    if not kept:
        return None
    if kept < num_tokens:
        # The tokenizer cuts, not we: a closing [SEP] must survive.
        ids = tokenizer(row.text, truncation=True, max_length=kept, verbose=False)["input_ids"]
        rules.tally.add("cut", f"{row.where}: has {num_tokens} tokens, kept are {len(ids)}")
    return _example(ids, number, row, rules)


def class_number(row: Row, config: DataConfig, limits: ModelLimits) -> int:
    """Return the number of a row's class, from 0.

    Raises:
        DataError: A name that is not in the list of labels, or a number out of range.
        ConfigError: More labels than the model has classes.
    """
    num_labels = limits.num_labels or len(config.labels) or None
    if num_labels is not None and len(config.labels) > num_labels:
        raise ConfigError(f"labels has {len(config.labels)} names, the model {num_labels} classes")
    label = row.label
    if isinstance(label, str) and label in config.labels:
        return config.labels.index(label)
    if isinstance(label, str) and not config.labels and label.isdecimal():
        label = int(label)  # CSV knows only text
    if not isinstance(label, int):
        known = f"one of the {len(config.labels)}" if config.labels else "a number; list them as"
        raise DataError(f"{row.where}: label is not {known} `labels`")
    if label < 0 or (num_labels is not None and label >= num_labels):
        bound = "" if num_labels is None else f" and below {num_labels}"
        raise DataError(f"{row.where}: label is {label}, must be at least 0{bound}")
    return label
