"""The generator of sample data: distinct, complete, reproducible, and split as it says."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from edge_sdk.data.rows import DataConfig, load_rows

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "data" / "make_sample.py"


def load_script() -> ModuleType:
    """Return the generator as a module: examples are no package."""
    spec = importlib.util.spec_from_file_location("make_sample", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_sample = load_script()


def pairs_in(path: Path) -> list[dict[str, str]]:
    """Return the pairs of one file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards of the default size and the dev file."""
    out: Path = tmp_path_factory.mktemp("sample")
    paths: list[Path] = make_sample.write_sample(out, 3, 3600, 300, 0, "meaning")
    return paths


def test_the_command_writes_what_the_function_writes(files: list[Path], tmp_path: Path) -> None:
    """The same seed gives the same bytes, whatever process and hash seed made them."""
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "new"), "--shards", "3"]
    subprocess.run(command, check=True, capture_output=True)

    for path in files:
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes()


def test_pairs_are_distinct(files: list[Path]) -> None:
    """There are as many different pairs as asked for, and none is both trained on and dev."""
    pairs = [(pair["prompt"], pair["completion"]) for path in files for pair in pairs_in(path)]
    trained = {pair["prompt"] for path in files[:-1] for pair in pairs_in(path)}
    dev = {pair["prompt"] for pair in pairs_in(files[-1])}

    assert len(pairs) == len(set(pairs)) == 3900
    assert not trained & dev


def test_every_attribute_is_told(files: list[Path]) -> None:
    """A sentence holds every value of its record, so that there is something to learn."""
    for pair in pairs_in(files[0]) + pairs_in(files[-1]):
        told = pair["completion"].lower()
        for key, value in re.findall(r"(\w+)\[(.*?)\]", pair["prompt"]):
            if key not in ("price", "dogs"):  # told in other words
                assert value.lower() in told, pair


def test_sentences_look_like_sentences(files: list[Path]) -> None:
    """Every sentence begins with a capital, ends with a stop, and leaves no template unfilled."""
    for pair in pairs_in(files[1]):
        sentences = re.split(r"(?<=\.) ", pair["completion"].replace("St Brendan", "Brendan"))
        assert all(re.fullmatch(r"[A-Z][^.{}|]+\.", sentence) for sentence in sentences), pair
        assert not re.search(r"  | a [aeiou]|\ban [^aeiou]|the the", pair["completion"]), pair


def test_shards_by_meaning_differ(files: list[Path]) -> None:
    """By meaning no kind of trip sits on all devices; by chance every kind does."""
    kinds = [{make_sample.kind_of(pair) for pair in pairs_in(path)} for path in files[:-1]]

    assert not set.intersection(*kinds)
    assert set.union(*kinds) == {make_sample.kind_of(pair) for pair in pairs_in(files[-1])}


def test_iid_shards_are_alike(tmp_path: Path) -> None:
    """By chance every shard holds every kind of trip, and sizes differ by one at most."""
    paths = make_sample.write_sample(tmp_path, 4, 1001, 10, 7, "iid")

    shards = [pairs_in(path) for path in paths[:-1]]

    assert sorted(map(len, shards)) == [250, 250, 250, 251]
    assert len({frozenset(make_sample.kind_of(pair) for pair in shard) for shard in shards}) == 1


def test_the_sdk_reads_it(files: list[Path]) -> None:
    """The shards are what `load_rows` expects, without any option."""
    rows = load_rows(files[0], DataConfig())

    assert len(rows) == 1200
    assert {row.schema for row in rows} == {"completion"}


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_statement_is_what_its_label_says(tmp_path: Path, num_classes: int) -> None:
    """True ones name the record's value, false ones another, unknown ones what it does not have."""
    train, dev = make_sample.write_sample(tmp_path, 1, 90, 30, 3, "iid", num_classes)

    rows = [*pairs_in(train), *pairs_in(dev)]
    labels = Counter(row["label"] for row in rows)

    assert len({row["text"].split("\n")[0] for row in rows}) == 120
    assert labels == dict.fromkeys(make_sample.CLASSES[:num_classes], 120 // num_classes)
    for row in rows:
        record, statement = row["text"].split("\n")
        told = dict(re.findall(r"(\w+)\[([^\]]+)\]", record))
        forms = {k: form.split("{}")[0] for k, (form, _) in make_sample.STATEMENTS.items()}
        values = {
            key: statement.removeprefix(forms[key])[:-1]
            for key, (_, known) in make_sample.STATEMENTS.items()
            if statement in [make_sample.STATEMENTS[key][0].format(value) for value in known]
        }
        ((key, value),) = values.items()
        assert row["label"] == (
            "unknown" if key not in told else "true" if told[key] == value else "false"
        )


@pytest.mark.parametrize(
    ("name", "num_classes"), [("trips", 0), ("statements-2", 2), ("statements-3", 3)]
)
def test_the_samples_that_lie_there_are_those_it_writes(
    tmp_path: Path, name: str, num_classes: int
) -> None:
    """240 rows to train on and 60 beside them, by the command of docs/papers.md."""
    train, dev = make_sample.write_sample(tmp_path, 1, 240, 60, 0, "iid", num_classes)

    there = ROOT / "examples" / "data" / name
    assert (there / "train.jsonl").read_bytes() == train.read_bytes()
    assert (there / "dev.jsonl").read_bytes() == dev.read_bytes()


@pytest.mark.parametrize("bad", [["--shards", "0"], ["--pairs", "x"], ["--pairs", "2"]])
def test_bad_options_are_refused(bad: list[str], tmp_path: Path) -> None:
    """Numbers that make no sense end the program before a file is written."""
    with pytest.raises(SystemExit):
        make_sample.main(["--out", str(tmp_path / "out"), *bad])

    assert not (tmp_path / "out").exists()
