"""The files of tests/data: each format gives the same rows, each schema what it should."""

from __future__ import annotations

import csv
import gzip
import json
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.data.paths import data_files
from edge_sdk.data.rows import DataConfig, Row, hold_out, load_rows
from edge_sdk.data.tally import Tally
from edge_sdk.errors import DataError

CASES = Path(__file__).parents[2] / "data"
PAIRS = [('One, "two"; three', "four\nfive"), ("caf\xe9", "six\tseven"), ("", "8|9")]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def read(name: str, **settings: Any) -> list[Row]:
    """Return the rows of one of the files."""
    return load_rows(CASES / name, DataConfig(**settings))


def said(row: Row) -> list[tuple[str, str | None]]:
    """Return who says what in a chat."""
    return [(turn["role"], turn["content"]) for turn in row.messages]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CASES.glob("pairs*")), ids=lambda path: path.name)
def test_every_format_gives_the_same_rows(path: Path) -> None:
    """Marks, line ends, separators, quotes and packing change nothing."""
    assert [(row.prompt, row.completion) for row in read(path.name)] == PAIRS


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("pairs.jsonl.gz", [1, 2, 3]),
        ("pairs.csv", [2, 4, 5]),
        ("pairs_excel.csv", [3, 5, 6]),
        ("pairs.json", [2, 6, 10]),
        ("pairs_one_line.json", [1, 1, 1]),
    ],
)
def test_rows_keep_their_lines(name: str, lines: list[int]) -> None:
    """A row's place is the line where it begins, and its number where lines do not tell rows."""
    places = [row.where.removeprefix(f"{CASES / name}:") for row in read(name)]

    items = [f" (item {i})" if ".json" in name[-5:] else "" for i in (1, 2, 3)]
    assert places == [f"{line}{item}" for line, item in zip(lines, items, strict=True)]


REFUSED = {
    "latin1.csv": [":3: byte 4 is not UTF-8", "Latin-1", "iconv"],
    "latin1.jsonl": [":2: byte 14 is not UTF-8", "Latin-1"],
    "latin1.json": [":2: is not UTF-8", "Latin-1"],
    "utf16.json": [":1: is UTF-16"],
    "preference.jsonl": [":1: is a preference (chosen, rejected)", "`columns`"],
    "preference_label.jsonl": [":2: is a preference (label: false)"],
    "image.jsonl": [":1: content of turn 1 has a part that is not text"],
    "no_columns.jsonl": [":1: needs text", "it has answer, question. Map names with `columns`"],
    "mixed.jsonl": [":2: has prompt + completion, but", ":1 has text; do not mix"],
    "two_schemas.jsonl": [":1: could be text or completion; say which with `columns`"],
    "half_conversational.jsonl": [":1: prompt is a list of turns, completion is text"],
    "bad_call.json": [":1 (item 1): turn 2 of conversations is not JSON"],
    "calls_without_a_name.jsonl": [":1: tool_calls of turn 1 holds a call without a name"],
    "no_comma.json": [":2: not JSON: a comma is missing behind item 1"],
    "open_list.json": [":3: not JSON: the file ends before its list does"],
    "open_string.json": [":2 (item 2): not JSON: in line 2, Unterminated string at column "],
    "bad_value.json": [":3 (item 2): not JSON: in line 3, Expecting value at column "],
    "more_behind.json": [":1: not JSON: something follows the list"],
    "columns.json": [":1 (item 1): text is list, not text"],
    "open_quote.csv": [":2: not CSV: unexpected end of data"],
    "twice.tsv": [":1: a column name appears twice"],
    "cut.jsonl.gz": [": the gzip file is cut or damaged, behind"],
    "trained.txt": ["must end in one of .jsonl, .csv, .parquet, .json, .tsv, .ndjson", ".gz"],
    "absent*.jsonl": [": no file fits this pattern"],
    "*.txt": [": trained.txt fits, but must end in one of"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    """One line names the file, the line and the reason, and quotes nothing."""
    with pytest.raises(DataError) as caught:
        read(name)

    text = str(caught.value)
    assert text.startswith(str(CASES))
    assert "\n" not in text
    assert all(word in text for word in REFUSED[name]), text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_cut_packed_file_is_never_a_short_one(tmp_path: Path, kind: str, share: float) -> None:
    """Wherever it is cut, and whether bad rows are skipped or not, the file is refused."""
    records = [{"text": f"number {i * i * i}"} for i in range(3000)]
    text = {
        "jsonl": "".join(json.dumps(record) + "\n" for record in records),
        "csv": "text\n" + "".join(f"{record['text']}\n" for record in records),
        "json": json.dumps(records),
    }[kind]
    packed = gzip.compress(text.encode())
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(packed[: int(len(packed) * share)])

    for bad_rows in ("refuse", "skip"):
        with pytest.raises(DataError, match="cut or damaged"):
            load_rows(path, DataConfig(bad_rows=bad_rows))  # type: ignore[arg-type]


def test_a_json_list_is_not_held_in_memory(tmp_path: Path) -> None:
    """A list of 8 MiB, on one line or on many, costs what its longest item needs."""
    from edge_sdk.data.formats import file_records

    items = [{"text": "a" * 1000, "n": i} for i in range(8000)]
    for indent in (None, 1):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(items, indent=indent))
        tracemalloc.start()

        count = sum(record["n"] == i for i, (_, record) in enumerate(file_records(path, ())))

        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == len(items)
        assert peak < 2**20


def test_a_json_list_is_what_the_json_library_reads(tmp_path: Path) -> None:
    """Values that lie across the borders of what is read at once come out whole."""
    values = [1, -2.5e10, "x" * 70_000, {"a": ["\u00e9" * 40_000, None]}, True, [], {}, 12345678]
    path = tmp_path / "a.json"
    from edge_sdk.data.formats import file_records

    for indent in (None, 2):
        for shift in range(0, 40, 7):
            text = " " * shift + json.dumps(values * 3, indent=indent, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")

            assert [record for _, record in file_records(path, ())] == values * 3


# ---- several files -------------------------------------------------------------------------------


def shards(folder: Path, names: Sequence[str]) -> None:
    """Write a row into each file: its own name."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


@pytest.mark.parametrize(
    ("names", "pattern", "expected"),
    [
        (["b.jsonl", "a.jsonl", "notes.txt"], "*", ["a.jsonl", "b.jsonl"]),
        (["b.jsonl", "a.json", "c.jsonl"], "*.jsonl", ["b.jsonl", "c.jsonl"]),
        (["x/a.jsonl", "a.jsonl"], "**/*.jsonl", ["a.jsonl", "x/a.jsonl"]),
        (["b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.txt"], "", ["a.jsonl", "b.jsonl"]),
        (["shard-1.jsonl", "shard-0.jsonl", "dev.jsonl"], "", ["shard-0.jsonl", "shard-1.jsonl"]),
        (["my_train.jsonl", "my_test.jsonl", "my-val.jsonl"], "", ["my_train.jsonl"]),
        (["trainer.jsonl", "developer.jsonl"], "", ["developer.jsonl", "trainer.jsonl"]),
        (["what[1].jsonl", "what1.jsonl"], "what[1].jsonl", ["what[1].jsonl"]),
    ],
)
def test_patterns_and_folders(
    tmp_path: Path, names: list[str], pattern: str, expected: list[str]
) -> None:
    """Their files come by name, parts of a data set that are not asked for stay out."""
    shards(tmp_path, names)

    rows = load_rows(None, DataConfig(path=str(tmp_path / pattern)))

    assert [row.text for row in rows] == expected


def test_a_folder_gives_the_part_that_is_asked_for(tmp_path: Path) -> None:
    """`split` chooses by the names of files; a part that is not there is named."""
    shards(tmp_path, ["train.jsonl", "dev.jsonl"])

    dev = load_rows(None, DataConfig(path=str(tmp_path), split="validation"))

    assert [row.text for row in dev] == ["dev.jsonl"]
    with pytest.raises(DataError, match=r"no file of the split 'test'; there are dev.jsonl, train"):
        load_rows(None, DataConfig(path=str(tmp_path), split="test"))


def test_several_files_are_read_in_their_order_and_once(tmp_path: Path) -> None:
    """A list keeps its order, a file that it names twice is read once."""
    shards(tmp_path, ["a.jsonl", "b.jsonl", "c.jsonl"])
    paths = [str(tmp_path / name) for name in ("c.jsonl", "*.jsonl")]

    rows = load_rows(None, DataConfig(path=paths))  # type: ignore[arg-type]

    assert [row.text for row in rows] == ["c.jsonl", "a.jsonl", "b.jsonl"]
    assert load_rows([Path(path) for path in paths], DataConfig()) == rows
    with pytest.raises(DataError, match="org/set: no such file; several sources must all be files"):
        data_files([*paths, "org/set"])


# ---- schemas -------------------------------------------------------------------------------------


def test_alpaca_is_the_prompt_of_that_data_set() -> None:
    """With and without input, and with a system text in the place of the first sentence."""
    rows = read("alpaca.jsonl")

    assert [row.completion for row in rows] == ["5", "Blue.", "A cat.", "Ahoy!"]
    assert rows[0].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n2 and 3\n\n### Response:"
    )
    assert rows[1].prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:"
    )
    assert rows[2].prompt == rows[1].prompt.replace("a colour", "an animal")
    sailor = "You are a sailor.\n\n### Instruction:\nGreet me.\n\n### Response:"
    assert rows[3].prompt == sailor


def test_alpaca_as_a_chat() -> None:
    """`alpaca: chat` keeps every column as turns; a history needs it."""
    rows = read("alpaca.jsonl", alpaca="chat")
    (talk,) = read("alpaca_history.jsonl", alpaca="chat")

    assert said(rows[0]) == [("user", "Add the numbers.\n\n2 and 3"), ("assistant", "5")]
    assert said(rows[1]) == [("user", "Name a colour."), ("assistant", "Blue.")]
    assert said(talk) == [
        ("system", "Be brief."),
        ("user", "What is the capital of France?"),
        ("assistant", "Paris."),
        ("user", "And of Spain?\n\nOne word."),
        ("assistant", "Madrid."),
    ]
    assert talk.targets == (2, 4)
    with pytest.raises(DataError, match=r":1: has a history, which only `alpaca: chat` can read"):
        read("alpaca_history.jsonl")


def test_alpaca_by_other_names_keeps_its_input() -> None:
    """Columns of Alpaca can be mapped, the optional ones too, which a row may then lack."""
    config = DataConfig(columns={"instruction": "ask", "input": "on", "output": "say"})

    with_input, without = load_rows(
        [{"ask": "a", "on": "b", "say": "c"}, {"ask": "a", "say": "c"}], config
    )

    assert "### Input:\nb\n" in with_input.prompt
    assert "### Input" not in without.prompt


def test_sharegpt() -> None:
    """Speakers become roles, calls become calls, and the columns beside the turns count."""
    first, second = read("sharegpt.json")

    assert said(first) == [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi!")]
    assert (first.targets, first.tools) == ((2,), ())
    assert said(second) == [
        ("system", "Use tools."),
        ("user", "2 and 3?"),
        ("assistant", None),
        ("tool", "5"),
        ("assistant", "It is 5."),
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    assert second.messages[2]["tool_calls"] == [call]
    function = {"name": "add", "parameters": {"type": "object"}}
    assert (second.targets, second.tools) == ((2, 4), ({"type": "function", "function": function},))


def test_openai_rows_with_tools() -> None:
    """Nothing of a tool call is lost, arguments are objects, and weight 0 carries no loss."""
    new, old = read("openai_tools.jsonl")

    assert said(new) == [
        ("user", "Is it raining in Oslo?"),
        ("assistant", None),
        ("tool", "rain"),
        ("assistant", "Yes."),
    ]
    function = {"name": "weather", "arguments": {"town": "Oslo"}}
    assert new.messages[1]["tool_calls"] == [{"type": "function", "id": "c1", "function": function}]
    assert (new.messages[2]["tool_call_id"], new.messages[2]["name"]) == ("c1", "weather")
    assert new.tools == old.tools == (TOOL,)
    assert new.targets == (1, 3)
    assert said(old)[0] == ("user", "And in Rome?")
    assert old.messages[1]["tool_calls"][0]["function"]["arguments"] == {"town": "Rome"}
    assert old.messages[2]["role"] == "tool"
    assert old.targets == (3,)


def test_conversational_prompt_and_completion() -> None:
    """Only the completion's turns carry loss, and rows of one prompt stay on one side."""
    (row,) = read("conversational.jsonl")

    assert said(row) == [
        ("user", "One"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    ]
    assert (row.schema, row.targets, row.asked) == ("chat", (3,), 3)
    asked = [[{"role": "user", "content": str(i // 2)}] for i in range(8)]
    answer = [{"role": "assistant", "content": "x"}]
    rows = load_rows([{"prompt": p, "completion": answer} for p in asked], DataConfig())
    train, held_out = hold_out(rows, 0.3, seed=0)
    assert not {r.messages[0]["content"] for r in train} & {
        r.messages[0]["content"] for r in held_out
    }


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"conversations": TURNS, "chosen": TURNS[1], "rejected": TURNS[1]}, "(chosen, rejected)"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "(chosen, rejected)"),
        ({"instruction": "a", "output": "b", "rejected": "c"}, "(chosen, rejected)"),
        ({"messages": TURNS, "label": False}, "(label: false)"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:], "label": False}, "(label: false)"),
        ({"conversations": TURNS, "kto_tag": False}, "(kto_tag: false)"),
    ],
)
def test_preferences_of_every_kind_are_refused(record: dict[str, Any], words: str) -> None:
    """An answer that is not wanted is never trained on."""
    with pytest.raises(DataError, match=re.escape(f"row:1: is a preference {words}")):
        load_rows([record], DataConfig())


def test_tables_hold_turns_and_tools_as_json(tmp_path: Path) -> None:
    """A cell with JSON of a chat is that chat."""
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "tools"], [json.dumps(TURNS), json.dumps([TOOL])]])

    (row,) = load_rows(path, DataConfig())

    assert (row.messages, row.tools) == (tuple(TURNS), (TOOL,))


def test_our_columns_come_before_those_of_others() -> None:
    """A row that was read before there were other schemas is read as it was."""
    record = {"text": "whole", "instruction": "a", "input": "b", "output": "c"}

    (row,) = load_rows([record], DataConfig())

    assert (row.schema, row.text) == ("text", "whole")


# ---- bad rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lines", "skipped"),
    [("bad_rows.jsonl", [1, 7], 5), ("bad_rows.csv", [2, 7], 4), ("bad_rows.json", [1, 7], 5)],
)
def test_bad_rows_can_be_skipped(name: str, lines: list[int], skipped: int) -> None:
    """The good rows around them are used, and the first bad ones are named."""
    tally = Tally("skip")

    rows = load_rows(CASES / name, DataConfig(bad_rows="skip"), tally)

    places = [row.where.partition(" (item")[0] for row in rows]
    assert places == [f"{CASES / name}:{line}" for line in lines]
    assert tally.count("skipped") == skipped
    assert len(tally.first("skipped")) == 3
    with pytest.raises(DataError) as caught:
        read(name)
    assert str(caught.value) == tally.first("skipped")[0]


def test_skipped_rows_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads without counting hears the number and the first places in the log."""
    read("bad_rows.jsonl", bad_rows="skip")

    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"data.skipped rows=5 first={CASES / 'bad_rows.jsonl'}:2:"
    )


def test_when_no_row_is_left_the_first_reason_is_the_error() -> None:
    """Skipping all of a file is no way to start a run."""
    with pytest.raises(DataError) as caught:
        read("no_columns.jsonl", bad_rows="skip")

    assert ":1: needs text" in str(caught.value)
    assert "no row of" in str(caught.value)
    assert "is left: 1 skipped" in str(caught.value)


def test_limit_counts_the_rows_that_are_used() -> None:
    """Two rows of a file whose second is bad are its first and its third good one."""
    rows = read("bad_rows.jsonl", bad_rows="skip", limit=2)

    assert len(rows) == 2


def test_columns_that_leave_out_the_input_of_alpaca_are_said() -> None:
    """It stays possible to train without it, but not without a word."""
    tally = Tally()

    columns = {"prompt": "instruction", "completion": "output"}
    rows = load_rows(CASES / "alpaca.jsonl", DataConfig(columns=columns), tally)

    assert rows[0].prompt == "Add the numbers."
    assert tally.count("ignored") == 1
    assert ":1: column input is not among `columns`" in tally.first("ignored")[0]
