"""Training data of one device, from any source to checked rows.

Knows schemas; knows no file format (readers.py), no tokenizer and no tensor. Messages name file,
line and column, and never quote a sample: the data is private and errors travel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edge_sdk.data.readers import RowSource, read_records, source_name
from edge_sdk.data.schemas import SCHEMAS, WORDS, Schema, check_columns, read_fields
from edge_sdk.data.tally import Tally
from edge_sdk.errors import ConfigError, DataError

INPUT = "input"
INPUT_LEFT_OUT = f"column {INPUT} is not among `columns`; map instruction, input and output instead"
CHOICES = {
    "alpaca": ("prompt", "chat"),
    "answers": ("each", "last"),
    "bad_rows": ("refuse", "skip"),
    "system_turn": ("own", "user"),
    "too_long": ("refuse", "cut", "drop"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Location of the private data of one device, and how it is read.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    path: str | tuple[str, ...] | None = None
    """A file (docs/data.md lists the formats), a pattern such as `shards/*.jsonl`, a folder, a list
    of these, or the id of a Hugging Face data set. Relative paths start from the working
    directory."""
    name: str | None = None
    """Configuration of a Hugging Face data set, where it has several."""
    split: str = "train"
    """Split of a Hugging Face data set, of which slices such as `train[:1000]` work; or of a folder
    whose file names tell it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our word -> their column, e.g. {"prompt": "mr", "completion": "ref"}; then other columns
    are ignored. Empty: the columns have our names."""
    alpaca: Literal["prompt", "chat"] = "prompt"
    """What a row with instruction, input and output becomes: the prompt text of the Alpaca data
    set, or a chat for the model's template."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; needed where labels are strings."""
    max_length: int | None = None
    """Tokens of the longest sequence; None: what the model can take."""
    too_long: Literal["refuse", "cut", "drop", "error"] = "refuse"
    """What happens to a longer sequence: refuse the data set; keep its first tokens, or leave the
    row out where no target is among them; leave the row out. `error` is refuse by its old name."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens to a row that cannot be used (not JSON, an empty completion, an unknown class):
    refuse the data set, or skip the row. How many were left out and where the first ones are is
    said at the start."""
    validation: str | tuple[str, ...] | None = None
    """Files or data set id of a private validation shard, as in `path`; same columns as the
    training data."""
    validation_split: str = "validation"
    """Split of `validation` where that is a Hugging Face data set."""
    validation_fraction: float = 0.0
    """Share of the rows held out for validation, below 1; rows of one prompt stay together."""
    separator: str = "\n"
    """Text between prompt and completion; part of the prompt, so it carries no loss."""
    append_eos: bool = True
    """Whether the end-of-text token follows text and completions, so that generation ends."""
    limit: int | None = None
    """Number of rows to use, from the first; None: all."""
    answers: Literal["each", "last"] = "each"
    """Which answers of a chat carry loss: all that the data wants learned, or the last one."""
    system_turn: Literal["own", "user"] = "own"
    """What a system turn becomes: a turn of its own, or text before that of the first user turn,
    for templates that know no system."""
    chat_template: Path | None = None
    """File with a chat template (Jinja) in place of the model's, which comes from the coordinator:
    one that you have read, or written."""
    chat_template_kwargs: dict[str, bool | int | str] = field(default_factory=dict)
    """Variables of the chat template, e.g. {"enable_thinking": false}."""

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "labels", tuple(self.labels))
        for key in ("path", "validation"):
            if isinstance(value := getattr(self, key), list):
                object.__setattr__(self, key, tuple(value))
        check_columns(self.columns)
        if self.too_long == "error":
            object.__setattr__(self, "too_long", "refuse")
        for key, choices in CHOICES.items():
            if (value := getattr(self, key)) not in choices:
                raise ValueError(f"{key} must be {' or '.join(map(repr, choices))}, got {value!r}")
        for key in ("max_length", "limit"):
            value, least = getattr(self, key), 2 if key == "max_length" else 1
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{key} must be a number of at least {least}, got {value!r}")
        if not 0.0 <= self.validation_fraction < 1.0:
            value = self.validation_fraction
            raise ValueError(f"validation_fraction must be in [0, 1), got {value}")
        if self.validation is not None and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must not repeat a name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checked sample; which fields are filled depends on the schema."""

    schema: Schema
    where: str
    """Origin for messages: `file:line`, lines counted from 1."""
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    """Chat turns as templates take them: `role`; `content`, None beside `tool_calls` alone;
    `tool_calls`, whose arguments are objects; `tool_call_id`, `name`, and what else a turn has."""
    targets: tuple[int, ...] = ()
    """Positions in `messages` of the turns that carry loss, at least one, all the assistant's."""
    asked: int = 0
    """Turns at the beginning that are the prompt of a row with prompt and completion; else 0."""
    tools: tuple[dict[str, Any], ...] = ()
    """What a chat may call, each `{"type": "function", "function": {...}}`."""
    label: int | str | None = None


def load_rows(
    source: RowSource | None, config: DataConfig, tally: Tally | None = None
) -> list[Row]:
    """Read and check every row of *source*, up to ``config.limit``.

    Args:
        source: A file, a data set id, an iterable of dictionaries, or a data set with ``len``
            and ``[]``; None stands for ``config.path``.
        config: Columns, split and limit; paths are relative to the working directory.
        tally: Counts what is skipped; without one that goes to the log.

    Returns:
        The rows in their order, all of one schema.

    Raises:
        DataError: Nothing there, unreadable, malformed, empty or of mixed schemas.
        ConfigError: Neither *source* nor ``config.path`` says where the data is.
    """
    if source is None and config.path is None:
        raise ConfigError("path must name a file or a data set, got None")
    source = config.path if source is None else source
    assert source is not None
    counted = tally or Tally(config.bad_rows)
    wanted = set(config.columns.values()) or set(WORDS)
    leaves_out = config.columns.get("prompt") == "instruction" and INPUT not in wanted
    if leaves_out:
        wanted.add(INPUT)
    records = read_records(source, wanted, config.name, config.split)
    rows: list[Row] = []
    while len(rows) != config.limit and (found := next(records, None)) is not None:
        where, record = found
        try:
            schema, row = _row(record, where, config, rows[:1])
        except DataError as error:
            counted.bad(error)
        else:
            counted.schemas[schema] += 1
            if leaves_out and record.get(INPUT):
                counted.add("ignored", f"{where}: {INPUT_LEFT_OUT}")
            rows.append(row)
    if tally is None:
        counted.say()
    if not rows:
        raise counted.refuse_empty(source_name(source))
    return rows


def _row(record: Any, where: str, config: DataConfig, before: Sequence[Row]) -> tuple[str, Row]:
    """Return the name of a record's schema, and its row, which is one of those of *before*."""
    if isinstance(record, DataError):
        raise record
    schema, fields = read_fields(record, where, config.columns, config.alpaca)
    row = Row(where=where, **fields)
    if before and row.schema != before[0].schema:
        ours, first = " + ".join(SCHEMAS[row.schema]), " + ".join(SCHEMAS[before[0].schema])
        raise DataError(f"{where}: has {ours}, but {before[0].where} has {first}; do not mix")
    return schema, row


def validation_shard(config: DataConfig) -> DataConfig | None:
    """Return how the validation shard is read; None where *config* names no other file for it."""
    if config.validation is None:
        return None
    split, path = config.validation_split, config.validation
    return replace(config, path=path, split=split, validation=None, limit=None)


def load_data(
    source: RowSource | None, config: DataConfig, seed: int, tally: Tally | None = None
) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the validation rows (none unless *config* asks for some).

    Raises:
        DataError: As for load_rows; or the two sets differ in schema; or nothing is left to train.
    """
    rows = load_rows(source, config, tally)
    if (shard := validation_shard(config)) is not None:
        held_out = load_rows(None, shard, tally)
        if held_out[0].schema != rows[0].schema:
            raise DataError(f"{held_out[0].where}: not the schema of {rows[0].where}")
        return rows, held_out
    if config.validation_fraction:
        return hold_out(rows, config.validation_fraction, seed)
    return rows, []


def hold_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split *rows* into training and validation, at least one row each; order is kept.

    Rows with the same prompt go to the same side: a reference of a prompt that was trained on
    would flatter the validation loss.

    Raises:
        DataError: There are not two different prompts (or rows) to put on two sides.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_prompt_of(row, str(index)), []).append(index)
    if len(groups) < 2:
        raise DataError(f"{rows[0].where}: too few rows to hold out a validation shard")
    wanted, chosen = max(1, round(fraction * len(rows))), set[int]()
    shuffled = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    for key in shuffled[:-1]:  # one group always stays to train on
        if len(chosen) >= wanted:
            break
        chosen.update(groups[key])
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def _prompt_of(row: Row, default: str) -> str:
    """Return what a row is an answer to, or *default* where that does not stand apart."""
    if row.schema == "completion":
        return row.prompt
    return json.dumps(row.messages[: row.asked]) if row.asked else default
