"""The preview shows what a run would learn from, on every device and in every terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.cli import main
from edge_sdk.client.config import ClientConfig
from edge_sdk.data.fast_tokenizer import PlainTokenizer
from edge_sdk.data.rows import DataConfig
from edge_sdk.preview.drawing import draw, written_tokens
from edge_sdk.preview.survey import Reader, Survey, find_model, survey

ROOT = Path(__file__).parents[3]
BASE = ROOT / "examples" / "base"
CASES = ROOT / "tests" / "data"
ESCAPE = re.compile(r"\033\[[\d;]*m")
LOSS = re.compile(r"\033\[97;48;5;2[28]m(.*?)\033\[0m")


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Return the tokenizer of the small model, as a device without torch has it."""
    config = ClientConfig(coordinator="tcp://nobody:0", server_key="", backend="onnxruntime")
    return find_model(config, str(BASE))


def write(path: Path, records: list[dict[str, Any]]) -> DataConfig:
    """Write *records* as JSON Lines and return how they are read."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(path=str(path))


def drawn(found: Survey, reader: Reader, *, colours: bool = False, width: int = 80) -> str:
    """Return the survey as text."""
    return draw(found, reader.tokenizer, num_examples=9, width=width, colours=colours)


TEXTS = [
    "The boat leaves.\n\n  At noon",
    "\u4f60\u597d, caf\u00e9 \U0001f600\U0001f680 e\u0301",
    "\t \x1b[31m|",
]


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_written_whole(library: str, text: str) -> None:
    """Pieces of letters and blanks between words come together as the text itself."""
    if library == "transformers":
        tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(BASE)
    else:
        tokenizer = PlainTokenizer(BASE)
    ids = tokenizer(text)["input_ids"]

    pieces = written_tokens(ids, tokenizer)

    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_what_carries_loss_is_marked(reader: Reader, tmp_path: Path) -> None:
    """Marks and colours hold the completion with its end, and nothing else."""
    config = write(tmp_path / "a.jsonl", [{"prompt": "One two", "completion": "three four"}])
    found = survey(config, reader, 10)

    plain, coloured = drawn(found, reader), drawn(found, reader, colours=True)

    (marked,) = re.findall(r"^  \{\+(.*)\+\}$", plain, flags=re.MULTILINE)
    assert marked.replace("<|endoftext|>", "").replace("|", "") == "three four"
    shown = "".join(LOSS.findall(coloured)).removesuffix(" carries loss ")
    assert shown == "three four<|endoftext|>"
    assert "carries loss" in plain


def test_a_terminal_is_never_written_past_its_edge(reader: Reader, tmp_path: Path) -> None:
    """Lines fit the width, and letters that would move the cursor are spelt out."""
    texts = ["word " * 70, "\u4f60" * 50 + "\x1b[2J\r\x07", "x" * 300]
    config = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    found = survey(config, reader, 10)

    for width in (60, 80, 120):
        for colours in (False, True):
            text = ESCAPE.sub("", drawn(found, reader, colours=colours, width=width))

            assert not set(text) & set("\x1b\r\x07")
            lines = [line for line in text.splitlines() if str(tmp_path) not in line]
            assert max(len(line) + line.count("\u4f60") for line in lines) <= width


@pytest.mark.parametrize("longest", [3, 40, 500])
@pytest.mark.parametrize("max_length", [2, 37, 512])
def test_the_histogram_counts_every_sample_once(
    reader: Reader, tmp_path: Path, longest: int, max_length: int
) -> None:
    """Bars add up to all samples, and those behind the mark are the ones that were cut."""
    counts = range(1, longest, max(1, longest // 40))
    records = [{"text": "sea" + " sea" * count} for count in counts]
    config = write(tmp_path / "a.jsonl", records)
    settings = DataConfig(path=config.path, max_length=max_length, too_long="cut")

    found = survey(settings, reader, 1000)
    text = drawn(found, reader)

    before, mark, behind = text.partition(f" max_length {max_length} -")
    bars = [
        sum(int(n.replace(",", "")) for n in re.findall(r" - +[\d,]+ .* ([\d,]+)$", part, re.M))
        for part in (before, behind)
    ]
    assert sum(bars) == len(records) == len(found.lengths)
    assert bars[1] == found.tally.count("cut") == sum(n > max_length for n in found.lengths)
    assert bool(mark) == (max(found.lengths) >= max_length)


# ---- the command ---------------------------------------------------------------------------------


def preview(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command with the small model and return its exit code and what it wrote."""
    code = main(["data", "preview", "--model", str(BASE), *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_rows_that_stop_a_run_are_all_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preview goes on where a run stops, says so, and ends with that run's exit code."""
    monkeypatch.chdir(CASES)
    mixed = ["--data", "bad_rows.jsonl", "--data", "pairs.csv"]

    code, out, _ = preview(capsys, *mixed, "data.max_length=12")
    skipping, skipped, _ = preview(
        capsys, *mixed, "data.max_length=12", "data.bad_rows=skip", "data.too_long=cut"
    )

    assert code == 7
    assert "5 read, 4 samples, 5 skipped, 1 dropped" in out
    assert "bad_rows.jsonl:3: not JSON" in out
    assert "pairs.csv:2: has 17 tokens, allowed are 12" in out
    assert "A run refuses this data" in out
    assert skipping == 0
    assert "5 read, 5 samples, 5 skipped, 1 cut" in skipped
    assert "refuses" not in skipped


def test_a_config_says_what_to_look_at(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The device's file is enough once it names a model, or a run has left its tokenizer."""
    left = tmp_path / "cache" / "0123.files"
    left.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (left / name).write_bytes((BASE / name).read_bytes())
    config = tmp_path / "device.yaml"
    config.write_text(
        f"coordinator: tcp://localhost:1\nserver_key: x\ncache: cache\n"
        f"data: {{path: '{CASES / 'alpaca.jsonl'}'}}\n"
    )

    code = main(["data", "preview", "--config", str(config), "--examples", "0"])

    out = capsys.readouterr().out
    assert (code, "Alpaca (4)" in out, str(left) in out) == (0, True, True)


def test_files_that_a_shell_has_found_are_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--data *.csv` names several files, among them no setting."""
    monkeypatch.chdir(CASES)

    _, out, _ = preview(capsys, "--data", "pairs.csv", "pairs.tsv", "data.limit=5")

    assert "data       pairs.csv, pairs.tsv\n" in out
    assert "5 read" in out


def test_the_validation_shard_is_looked_at_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A run reads it, and so would stop at its rows; it is counted and not shown."""
    dev = CASES / "bad_rows.csv"

    code, out, _ = preview(
        capsys, "--data", str(CASES / "pairs.csv"), f"data.validation={dev}", "--examples", "1"
    )

    assert code == 7
    assert out.count("carry loss (") == 2
    assert f"{dev}:3: not CSV" in out
    assert len(re.findall(r": \d+ tokens, \d+ carry loss", out)) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "absent.jsonl"], 7, "absent.jsonl: No such file"),
        ([], 2, "path must name"),
        (["--data", str(CASES / "cut.jsonl.gz")], 7, "cut or damaged"),
        (["--data", str(CASES / "no_columns.jsonl")], 7, "no_columns.jsonl:1: needs text"),
        (["--data", str(CASES / "pairs.csv"), "--model", "./nowhere"], 8, "does not exist"),
        (["--data", str(CASES / "pairs.csv"), "data.max_length=9999"], 2, "the model takes 512"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    """Exit codes and errors are those of a run."""
    found, _, err = preview(capsys, *arguments)

    assert (found, len(err.splitlines())) == (code, 1), err
    assert words in err


HIDE = """
import importlib.machinery as machinery, sys

class Hidden(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        hidden = name.split(".")[0] in ("torch", "transformers", "rich")
        return None if hidden else super().find_spec(name, *rest)

sys.meta_path[sys.meta_path.index(machinery.PathFinder)] = Hidden
"""


def test_it_works_without_torch_and_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """A device with tokenizers alone sees the same tokens and marks."""
    arguments = ["--data", str(CASES / "pairs.csv")]
    command = ["data", "preview", "--model", str(BASE), *arguments]
    code = f"{HIDE}\nfrom edge_sdk.cli import main\nsys.exit(main({command}))"

    small = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    small_lines, whole_lines = (
        small.stdout.splitlines(),
        preview(capsys, *arguments)[1].splitlines(),
    )
    assert small_lines[0].endswith("(by tokenizers)")
    assert small_lines[1:] == whole_lines[1:]
