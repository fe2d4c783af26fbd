"""Training data of one device, from any source to checked rows.

Knows schemas; knows no file format (readers.py), no tokenizer and no tensor. Messages name file,
line and column, and never quote a sample: the data is private and errors travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from edge_sdk.data.readers import RowSource, read_records, source_name
from edge_sdk.errors import ConfigError, DataError

Schema = Literal["text", "completion", "chat", "label"]
SCHEMAS: dict[Schema, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
}
"""The columns that make each schema."""
WORDS = ("text", "prompt", "completion", "messages", "label")
ALLOWED = "text; prompt and completion; messages; or text and label"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Location of the private data of one device, and how it is read.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    path: str | None = None
    """A .jsonl, .csv or .parquet file, or the id of a Hugging Face data set; a relative path
    starts from the working directory."""
    name: str | None = None
    """Configuration of a Hugging Face data set, where it has several."""
    split: str = "train"
    """Split of a Hugging Face data set; slices such as `train[:1000]` work."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our word -> their column, e.g. {"prompt": "mr", "completion": "ref"}; then other columns
    are ignored. Empty: the columns have our names."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; needed where labels are strings."""
    max_length: int | None = None
    """Tokens of the longest sequence; None: what the model can take."""
    too_long: Literal["error", "cut"] = "error"
    """What happens to a longer sequence: refuse the data set, or keep its first tokens."""
    validation: str | None = None
    """File or data set id of a private validation shard; same columns as the training data."""
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

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "labels", tuple(self.labels))
        _check_columns(self.columns)
        for key in ("max_length", "limit"):
            value, least = getattr(self, key), 2 if key == "max_length" else 1
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{key} must be a number of at least {least}, got {value!r}")
        if self.too_long not in ("error", "cut"):
            raise ValueError(f"too_long must be 'error' or 'cut', got {self.too_long!r}")
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
    """Chat turns, each with `role` and `content`; at least one is the assistant's."""
    label: int | str | None = None


def load_rows(source: RowSource | None, config: DataConfig) -> list[Row]:
    """Read and check every row of *source*, up to ``config.limit``.

    Args:
        source: A file, a data set id, an iterable of dictionaries, or a data set with ``len``
            and ``[]``; None stands for ``config.path``.
        config: Columns, split and limit; paths are relative to the working directory.

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
    wanted = set(config.columns.values()) or set(WORDS)
    records = read_records(source, wanted, config.name, config.split)
    rows: list[Row] = []
    for where, record in islice(records, config.limit):
        row = _row(record, where, config)
        if rows and row.schema != rows[0].schema:
            ours, first = " + ".join(SCHEMAS[row.schema]), " + ".join(SCHEMAS[rows[0].schema])
            raise DataError(f"{where}: has {ours}, but {rows[0].where} has {first}; do not mix")
        rows.append(row)
    if not rows:
        raise DataError(f"{source_name(source)}: holds no rows")
    return rows


def load_data(
    source: RowSource | None, config: DataConfig, seed: int
) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the validation rows (none unless *config* asks for some).

    Raises:
        DataError: As for load_rows; or the two sets differ in schema; or nothing is left to train.
    """
    rows = load_rows(source, config)
    if config.validation is not None:
        held_out = _load_validation(config)
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
        key = row.prompt if row.schema == "completion" else str(index)
        groups.setdefault(key, []).append(index)
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


def _load_validation(config: DataConfig) -> list[Row]:
    """Read the validation shard with the columns of *config*."""
    shard = DataConfig(
        path=config.validation,
        name=config.name,
        split=config.validation_split,
        columns=config.columns,
    )
    return load_rows(None, shard)


def _check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a mapping that does not name the columns of exactly one schema."""
    if not columns:
        return
    if sorted(columns) not in [sorted(words) for words in SCHEMAS.values()]:
        raise ValueError(f"columns must name {ALLOWED}; got {sorted(columns)}")
    if not all(isinstance(column, str) and column for column in columns.values()):
        raise ValueError(f"columns must map to names of columns, got {dict(columns)}")


def _missing(columns: Iterable[Any], where: str, config: DataConfig) -> DataError:
    """Return the error for a row that has values in *columns* only, too few for any schema."""
    have = ", ".join(sorted(map(str, columns))[:20]) or "no values"
    if config.columns:
        lost = sorted(set(config.columns.values()) - set(columns))
        return DataError(f"{where}: lacks {', '.join(lost)}; it has {have}")
    return DataError(f"{where}: needs {ALLOWED}; it has {have}. Map names with `columns`")


def _row(record: Any, where: str, config: DataConfig) -> Row:
    """Return *record* as a checked row.

    Raises:
        DataError: Not a dictionary, no or several schemas, or an unusable value.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: is {type(record).__name__}, not an object with named columns")
    names = config.columns or {word: word for word in WORDS}
    values = {word: record.get(column) for word, column in names.items()}
    values = {word: value for word, value in values.items() if value is not None}
    schema = _schema(values.keys(), record, where, config)
    checked: dict[str, Any] = {}
    for word in SCHEMAS[schema]:
        if word == "messages":
            checked[word] = _messages(values[word], where)
        elif word == "label":
            checked[word] = _label(values[word], where)
        else:
            checked[word] = _text(values[word], where, word, may_be_empty=word == "prompt")
    return Row(schema=schema, where=where, **checked)


def _schema(
    words: Iterable[str], record: Mapping[str, Any], where: str, config: DataConfig
) -> Schema:
    """Return the one schema whose columns are all among *words*."""
    found = [schema for schema, needed in SCHEMAS.items() if set(needed) <= set(words)]
    if "label" in found:
        found.remove("text")
    if config.columns and set(config.columns) != set(words) or not found:
        present = [column for column, value in record.items() if value is not None]
        raise _missing(present, where, config)
    if len(found) > 1:
        raise DataError(f"{where}: could be {' or '.join(found)}; say which with `columns`")
    return found[0]


def _text(value: Any, where: str, word: str, *, may_be_empty: bool) -> str:
    """Return *value* if it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {word} is {type(value).__name__}, not text")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where}: {word} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {word} holds half of a surrogate pair") from error
    return value


def _label(value: Any, where: str) -> int | str:
    """Return *value* if it can stand for a class."""
    if isinstance(value, str) and value.strip():
        return value
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return int(value)
    raise DataError(f"{where}: label is {type(value).__name__}, not a number or a name")


def _messages(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Return the turns of a chat if each has a role and content and one is the assistant's."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: messages must be a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: turn {number} of messages is not an object")
        _text(turn.get("role"), where, f"role of turn {number}", may_be_empty=False)
        is_ours = turn.get("role") == "assistant"
        _text(turn.get("content"), where, f"content of turn {number}", may_be_empty=not is_ours)
        turns.append({key: item for key, item in turn.items() if item is not None})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{where}: messages hold no turn of the assistant, nothing to learn")
    return tuple(turns)
