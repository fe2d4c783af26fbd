"""Records of every source: files, memory, torch and the hub, and every way they can be broken."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.errors import ConfigError, DataError
from tests.edge_sdk.data.conftest import Write

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


class Items:
    """A data set as torch has them: a length and items, no iteration, no IndexError."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]


def error_of(source: Any, config: DataConfig | None = None) -> str:
    """Return the message with which *source* is refused."""
    with pytest.raises(DataError) as caught:
        load_rows(source, config or DataConfig())
    return str(caught.value)


def test_memory_sources_agree() -> None:
    """Lists, generators and data sets with len and [] give the same rows."""
    records = [{"text": "a"}, {"text": "b"}]

    expected = load_rows(records, DataConfig())

    assert load_rows(iter(records), DataConfig()) == expected
    assert load_rows(Items(records), DataConfig()) == expected


def test_torch_data_sets_work() -> None:
    """A torch.utils.data.Dataset of dictionaries, map-style or iterable, is a source."""
    torch = pytest.importorskip("torch")

    class Mapped(Items, torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
        """Map-style."""

    class Streamed(torch.utils.data.IterableDataset):  # type: ignore[misc, name-defined]
        """Endless."""

        def __iter__(self) -> Iterator[dict[str, str]]:
            while True:
                yield {"text": "a"}

    assert len(load_rows(Mapped([{"text": "a"}] * 3), DataConfig())) == 3
    assert len(load_rows(Streamed(), DataConfig(limit=5))) == 5


def test_items_that_are_no_dictionaries_are_refused() -> None:
    """A data set of tensors or tuples gets told what is wrong, not an attribute error."""
    assert "row:1: is tuple" in error_of(Items([("a", 1)]))


@pytest.mark.parametrize("source", [{"train": []}, 7, object()])
def test_sources_that_are_none_are_refused(source: Any) -> None:
    """A dictionary of splits, a number or any object is not a source."""
    assert error_of(source)


def test_no_source_at_all_is_a_mistake_of_the_configuration() -> None:
    """Neither a source nor a path: the configuration is to be mended."""
    with pytest.raises(ConfigError, match="path"):
        load_rows(None, DataConfig())


def test_limit_takes_the_first_rows(write: Write) -> None:
    """Rows after the limit are not even looked at."""
    path = write("a.jsonl", '{"text": "a"}\n{"text": "b"}\nbroken')

    rows = load_rows(None, DataConfig(path=str(path), limit=2))

    assert [row.text for row in rows] == ["a", "b"]


def test_jsonl_with_mark_crlf_and_blank_lines(write: Write) -> None:
    """A byte order mark, CRLF and blank lines change nothing but the line numbers."""
    path = write("a.jsonl", b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n\r\n  \n{"text": "b"}')

    rows = load_rows(path, DataConfig())

    assert [(row.text, row.where) for row in rows] == [("\xe9", f"{path}:1"), ("b", f"{path}:4")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no rows"]),
        (b"\n\n", ["no rows"]),
        (b'{"text": "a"}\n{"text": "b"\n', [":2: not JSON", "column"]),
        (b'{"text": "a"} {"text": "b"}\n', [":1: not JSON"]),
        (b'["text"]\n', [":1: is list"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', [":2: byte 11 is not UTF-8"]),
        ('{"text": "a"}\n'.encode("utf-16"), [":1: is UTF-16"]),
        (b"[" * 100_000, [":1: not"]),
        (b'{"text": ' + b"9" * 5000 + b"}", [":1:"]),
    ],
)
def test_bad_jsonl_is_named(write: Write, content: bytes, words: list[str]) -> None:
    """A malformed file is refused with its name, the line and what is wrong there."""
    path = write("bad.jsonl", content)

    message = error_of(path)

    assert message.startswith(str(path))
    assert all(word in message for word in words), message


MISTAKES = {
    '{"a": "x", "b": "open}': "Unterminated string at column 17",
    '{"a": "x" "b": 1}': "Expecting ',' delimiter at column 11",
    '{"a": "x", "b": y}': "Expecting value at column 17",
    "{'a': 1}": "Expecting property name enclosed in double quotes at column 2",
    '{"a": 1': "Expecting ',' delimiter at column 8, where the line ends",
    '{"a": "tab\there"}': "Invalid control character at column 11",
}


@pytest.mark.parametrize("line", MISTAKES)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_the_column_of_a_mistake_is_where_it_begins(write: Write, line: str, end: str) -> None:
    """Whatever the line ends with; a string without an end begins at the column that is named."""
    path = write("bad.jsonl", f'{{"text": "fine"}}\n{line}{end}')

    assert error_of(path) == f"{path}:2: not JSON: {MISTAKES[line]}"


def test_csv_with_quotes_and_lines_inside_cells(write: Write) -> None:
    """Quoted cells keep commas, quotes and line ends, and rows keep their first line's number."""
    text = '\ufeffmr,ref\r\n"a, ""b""","c\r\nd"\r\n\r\ne,f\r\n'
    config = DataConfig(columns={"prompt": "mr", "completion": "ref"})
    path = write("a.csv", text)

    rows = load_rows(path, config)

    assert [(row.prompt, row.completion) for row in rows] == [('a, "b"', "c\r\nd"), ("e", "f")]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no rows"]),
        ("text\n", ["no rows"]),
        ("text,text\na,b\n", [":1:", "twice"]),
        ("text,label\na,1\nb\n", [":3: 1 cells under 2 columns"]),
        ("text\na,b\n", [":2: 2 cells under 1 columns"]),
        ('text\n"a\n', [":2: not CSV"]),
        ('text\n"a"b\n', [":2: not CSV"]),
        ("text\n" + "a" * 200_000, [":2: not CSV"]),
        (b"text\na\n\xe9\n", [":3: byte 1 is not UTF-8"]),
        ("title\na\n", [":2: needs", "it has title"]),
        ("prompt,completion\na,\n", [":2: completion is empty"]),
    ],
)
def test_bad_csv_is_named(write: Write, content: str, words: list[str]) -> None:
    """A malformed table is refused with its name, the line and what is wrong there."""
    path = write("bad.csv", content)

    message = error_of(path)

    assert message.startswith(str(path))
    assert all(word in message for word in words), message


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_formats_agree(texts: list[str]) -> None:
    """JSON Lines, CSV and memory give the same text, whatever characters it holds."""
    import tempfile

    records = [{"prompt": text, "completion": text} for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        jsonl, table = Path(folder, "a.jsonl"), Path(folder, "a.csv")
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        jsonl.write_bytes("\n".join(lines).encode())
        with table.open("w", encoding="utf-8", newline="") as file:
            # A lone carriage return must be quoted too, which QUOTE_MINIMAL may leave out.
            writer = csv.DictWriter(file, ["prompt", "completion"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(records)

        for path in (jsonl, table):
            assert [row.completion for row in load_rows(path, DataConfig())] == texts


def test_parquet(tmp_path: Path) -> None:
    """Parquet rows are numbered from 1, and columns that no schema needs stay unread."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    columns = {"text": ["a", "b", None], "label": [0, 1, 1], "image": [b"\x00"] * 3}
    parquet.write_table(pa.table(columns), path)

    rows = load_rows(path, DataConfig(limit=2))

    assert [(row.text, row.label, row.where) for row in rows] == [
        ("a", 0, f"{path}:1"),
        ("b", 1, f"{path}:2"),
    ]
    assert f"{path}:3: needs" in error_of(path)
    assert "it has image, label, text" in error_of(path, DataConfig(columns={"text": "body"}))


def test_parquet_chats_lose_the_nulls_of_other_turns(tmp_path: Path) -> None:
    """Parquet fills absent keys of a turn with null; a chat template must not see those."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{**TURNS[0], "name": "x"}, TURNS[1]]
    parquet.write_table(pa.table({"messages": [turns]}), tmp_path / "a.parquet")

    (row,) = load_rows(tmp_path / "a.parquet", DataConfig())

    assert row.messages == tuple(turns)


def test_broken_parquet_is_named(write: Write) -> None:
    """A file that is Parquet by name only is refused with its name."""
    pytest.importorskip("pyarrow")

    assert "bad.parquet" in error_of(write("bad.parquet", b"PAR1 not really"))
    assert "bad.parquet" in error_of(write("bad.parquet", b""))


@pytest.mark.parametrize(
    "name", ["none.jsonl", "none.csv", "none.parquet", "none.txt", "data.json"]
)
def test_absent_files_are_named(tmp_path: Path, name: str) -> None:
    """A file that is not there is refused with its path."""
    assert str(tmp_path / name) in error_of(tmp_path / name)


@pytest.mark.parametrize("path", ["", "../nowhere", "a/b/c", "~no-such-user", "two words"])
def test_what_can_be_no_id_is_not_looked_up(path: str) -> None:
    """A mistyped path never turns into a question to the hub."""
    assert error_of(path) == f"{path!r}: no such file, and not the id of a data set"


def test_unreadable_places_are_named(tmp_path: Path, write: Write) -> None:
    """A folder with the name of a file, and a file of another kind, are refused."""
    (tmp_path / "dir.jsonl").mkdir()

    assert "dir.jsonl" in error_of(tmp_path / "dir.jsonl")
    assert ".jsonl, .csv, .parquet" in error_of(write("notes", "text"))


def test_data_set_ids_go_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id is loaded with its name and split, and rows are named after both."""
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def fake(path: str, name: str | None, *, split: str) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "image": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    config = DataConfig(path="org/set", name="small", split="dev")

    rows = load_rows(None, config)

    assert asked == [("org/set", "small", "dev")]
    assert [row.where for row in rows] == ["org/set[dev]:1", "org/set[dev]:2"]


def test_unknown_data_set_ids_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's library throws becomes one error of ours."""
    datasets = pytest.importorskip("datasets")

    def fail(*args: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/set' not found\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)

    assert error_of("org/set") == "org/set: no such file or data set (Dataset 'org/set' not found)"


def test_optional_libraries_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the `data` extra, ids and Parquet files say what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert "edgesplit[data]" in error_of("org/set")
    assert "edgesplit[data]" in error_of(tmp_path / "a.parquet")
