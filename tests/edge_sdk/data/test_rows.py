"""Rows of every source and schema, and every way in which they can be bad."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.data.rows import DataConfig, Row, hold_out, load_data, load_rows
from edge_sdk.data.schemas import SCHEMAS
from edge_sdk.errors import DataError
from tests.edge_sdk.data.conftest import Write

PAIR = {"prompt": "p", "completion": "c"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def error_of(source: Any, config: DataConfig | None = None) -> str:
    """Return the message with which *source* is refused."""
    with pytest.raises(DataError) as caught:
        load_rows(source, config or DataConfig())
    return str(caught.value)


# ---- schemas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        ({"text": "t"}, "text"),
        (PAIR, "completion"),
        (CHAT, "chat"),
        ({"text": "t", "label": 3}, "label"),
        ({"text": "t", "label": "good"}, "label"),
        ({"text": "t", "label": None, "id": 7}, "text"),
        ({"prompt": "", "completion": "c", "label": True}, "completion"),
    ],
)
def test_schema_follows_from_the_columns(record: dict[str, Any], schema: str) -> None:
    """The columns that hold values decide the schema; other columns do not matter."""
    (row,) = load_rows([record], DataConfig())

    assert row.schema == schema
    assert row.where == "row:1"


def test_columns_map_their_names_to_ours() -> None:
    """With `columns` only the mapped columns count, even where others have our names."""
    config = DataConfig(columns={"prompt": "mr", "completion": "ref"})

    (row,) = load_rows([{"mr": "m", "ref": "r", "text": "other"}], config)

    assert (row.prompt, row.completion, row.text) == ("m", "r", "")


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"text": "t"}, PAIR], ["row:2", "prompt + completion", "row:1"]),
        ([{"text": "t", "label": 1}, {"text": "t"}], ["row:2", "has text, but row:1"]),
        ([{**PAIR, "text": "t"}], ["row:1", "text or completion", "`columns`"]),
        ([{"prompt": "p"}], ["row:1", "needs", "it has prompt"]),
        ([{"mr": "m", "ref": "r"}], ["row:1", "it has mr, ref", "`columns`"]),
        ([{}], ["row:1", "no values"]),
        ([], ["list", "no rows"]),
        ([3], ["row:1", "int"]),
        ([["text"]], ["row:1", "list"]),
        ([{"text": " \n"}], ["row:1", "text is empty"]),
        ([{"text": 5}], ["row:1", "text is int"]),
        ([{"prompt": "p", "completion": ""}], ["row:1", "completion is empty"]),
        ([{"prompt": "p", "completion": None}], ["row:1", "needs"]),
        ([{"text": "\ud800"}], ["row:1", "surrogate"]),
        ([{"text": "t", "label": 1.5}], ["row:1", "label is float"]),
        ([{"text": "t", "label": True}], ["row:1", "label is bool"]),
        ([{"text": "t", "label": ""}], ["row:1", "label is str"]),
        ([{"messages": "hi"}], ["row:1", "list of turns"]),
        ([{"messages": []}], ["row:1", "list of turns"]),
        ([{"messages": ["hi"]}], ["row:1", "turn 1"]),
        ([{"messages": [{"role": "user"}]}], ["row:1", "content of turn 1"]),
        ([{"messages": [{"content": "x"}]}], ["row:1", "role of turn 1"]),
        ([{"messages": CHAT["messages"][:1]}], ["row:1", "assistant"]),
        (
            [{"messages": [{"role": "assistant", "content": ""}]}],
            ["row:1", "content of turn 1 is empty"],
        ),
    ],
)
def test_bad_rows_are_named(records: list[Any], words: list[str]) -> None:
    """A row that cannot be used is refused with its place and the reason."""
    message = error_of(records)

    assert all(word in message for word in words), message


def test_a_missing_mapped_column_is_named() -> None:
    """When a mapped column is absent or null, the message says which and what there is."""
    config = DataConfig(columns={"prompt": "mr", "completion": "ref"})

    assert error_of([{"mr": "m", "x": 1}], config) == "row:1: lacks ref; it has mr, x"
    assert error_of([{"mr": "m", "ref": None}], config) == "row:1: lacks ref; it has mr"


def test_messages_never_quote_the_data() -> None:
    """Errors travel and are logged, so they hold names of columns and no private text."""
    secret = "my diagnosis"
    bad = [
        [{"text": secret}, {"prompt": secret, "completion": " "}],
        [{"text": secret, "prompt": secret, "completion": secret}],
        [{"text": [secret]}],
        [{"messages": [{"role": secret, "content": secret}]}],
    ]

    assert not any(secret in error_of(records) for records in bad)


# ---- validation shards ---------------------------------------------------------------------------


def test_validation_from_a_file(write: Write) -> None:
    """A validation file is read with the same columns and must have the same schema."""
    train = write("train.jsonl", [{"a": "x"}] * 3)
    dev = write("dev.jsonl", [{"a": "y"}])
    config = DataConfig(path=str(train), columns={"text": "a"}, validation=str(dev), limit=1)

    rows, held_out = load_data(None, config, seed=0)

    assert ([row.text for row in rows], [row.text for row in held_out]) == (["x"], ["y"])


def test_validation_of_another_schema_is_refused(write: Write) -> None:
    """Pairs cannot be validated on plain text."""
    config = DataConfig(validation=str(write("dev.jsonl", [{"text": "t"}])))

    with pytest.raises(DataError, match=r"dev.jsonl:1: not the schema of row:1"):
        load_data([PAIR], config, seed=0)


def test_no_validation_unless_asked_for() -> None:
    """By default everything is trained on."""
    rows, held_out = load_data([PAIR] * 3, DataConfig(), seed=0)

    assert (len(rows), held_out) == (3, [])


@given(st.lists(st.integers(0, 9), min_size=2), st.floats(0.01, 0.99), st.integers(0, 9))
def test_held_out_prompts_are_never_trained_on(
    prompts: list[int], fraction: float, seed: int
) -> None:
    """Both sides are non-empty, keep order and multiplicity, and share no prompt."""
    records = [{"prompt": str(prompt), "completion": str(i)} for i, prompt in enumerate(prompts)]
    rows = load_rows(records, DataConfig())
    if len(set(prompts)) < 2:
        with pytest.raises(DataError, match="too few"):
            hold_out(rows, fraction, seed)
        return

    train, held_out = hold_out(rows, fraction, seed)

    assert train
    assert held_out
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert sorted(train + held_out, key=lambda row: int(row.completion)) == rows
    assert hold_out(rows, fraction, seed) == (train, held_out)


def test_the_fraction_is_about_met() -> None:
    """A tenth of a thousand texts is a hundred texts, and another seed takes others."""
    records = [{"text": str(i)} for i in range(1000)]
    config = DataConfig(validation_fraction=0.1)

    splits: list[list[Row]] = [load_data(records, config, seed)[1] for seed in (0, 1)]

    assert [len(split) for split in splits] == [100, 100]
    assert splits[0] != splits[1]


# ---- configuration and imports -------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"max_length": 1},
        {"max_length": "512"},
        {"limit": 0},
        {"limit": True},
        {"too_long": "trim"},
        {"bad_rows": "drop"},
        {"alpaca": "text"},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"validation_fraction": float("nan")},
        {"validation_fraction": 0.1, "validation": "dev.jsonl"},
        {"columns": {"prompt": "mr"}},
        {"columns": {"promt": "mr", "completion": "ref"}},
        {"columns": {"text": ""}},
        {"labels": ["a", "a"]},
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any]) -> None:
    """A field out of its range is named in the message."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        DataConfig(**fields)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_columns_of_every_schema_can_be_mapped(schema: Any) -> None:
    """The words of each schema are a legal mapping."""
    assert DataConfig(columns={word: word.upper() for word in SCHEMAS[schema]})


def test_labels_may_come_as_a_list() -> None:
    """YAML gives lists; the configuration stays immutable."""
    assert DataConfig(labels=["a", "b"]).labels == ("a", "b")  # type: ignore[arg-type]


def test_import_is_light() -> None:
    """Reading, tokenising and batching are imported without torch, transformers or datasets."""
    heavy = ["torch", "transformers", "datasets", "pyarrow", "jinja2"]
    modules = "edge_sdk.data.rows, edge_sdk.data.tokenize, edge_sdk.data.batches"
    modules += ", coordinator.lab.simulation.sharding"
    code = f"import {modules}, sys; print([m for m in {heavy} if m in sys.modules])"

    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert output.stdout.strip() == "[]"
