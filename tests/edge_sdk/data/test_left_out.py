"""Rows that a run skips, drops or cuts: the others are as if these had never been there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.config.describe import dump_config
from edge_sdk.config.loader import load_config
from edge_sdk.data.fast_tokenizer import PlainTokenizer
from edge_sdk.data.rows import DataConfig, load_data, load_rows
from edge_sdk.data.tally import Tally
from edge_sdk.data.tokenize import Example, ModelLimits, tokenize_rows
from edge_sdk.errors import DataError

ROOT = Path(__file__).parents[3]
TOKENIZER: Any = PlainTokenizer(ROOT / "examples" / "base")
LIMITS = ModelLimits(vocab_size=4096, max_positions=512)
GOOD = [{"prompt": "one", "completion": "two"}, {"prompt": "three", "completion": "four"}]
LONG_PROMPT = {"prompt": "sea " * 40, "completion": "end"}
LONG_ANSWER = {"prompt": "one", "completion": "sea " * 40}


def tokens(
    records: list[dict[str, Any]], tally: Tally | None = None, **settings: Any
) -> list[Example]:
    """Return the samples of *records*, at most 16 tokens long."""
    config = DataConfig(max_length=16, **settings)
    return tokenize_rows(load_rows(records, config), TOKENIZER, config, LIMITS, tally)


def same(ours: list[Example], theirs: list[Example]) -> bool:
    """Whether two lists hold the same samples, wherever they come from."""
    return len(ours) == len(theirs) and all(
        np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("row", [LONG_PROMPT, LONG_ANSWER])
def test_too_long_rows_are_refused_dropped_or_cut(row: dict[str, Any], place: int) -> None:
    """One of them anywhere: the others stay as they are, and what became of it is counted."""
    records = [*GOOD[:place], row, *GOOD[place:]]
    expected = tokens(GOOD)

    for name in ("refuse", "error"):
        with pytest.raises(DataError, match=rf"^row:{place + 1}: has \d+ tokens, allowed are 16;"):
            tokens(records, too_long=name)
    dropping, cutting = Tally(), Tally()
    dropped = tokens(records, dropping, too_long="drop")
    cut = tokens(records, cutting, too_long="cut")

    assert same(dropped, expected)
    assert (dropping.count("dropped"), dropping.count("cut")) == (1, 0)
    if row is LONG_PROMPT:  # nothing to learn is left of it
        assert same(cut, expected)
        assert (cutting.count("dropped"), cutting.count("cut")) == (1, 0)
        assert f"row:{place + 1}: holds no target among its first 16" in cutting.first("dropped")[0]
        return
    assert same(cut[:place] + cut[place + 1 :], expected)
    assert len(cut[place].input_ids) == 16
    assert (cutting.count("dropped"), cutting.count("cut")) == (0, 1)
    assert cutting.first("cut")[0].startswith(f"row:{place + 1}: has ")


def test_a_classifier_drops_and_skips_too() -> None:
    """A text too long and a class that nobody knows leave the others as they are."""
    good = [{"text": "one", "label": "b"}, {"text": "two", "label": "a"}]
    bad = [{"text": "sea " * 40, "label": "a"}, {"text": "three", "label": "c"}]
    settings: dict[str, Any] = {"labels": ("a", "b"), "too_long": "drop", "bad_rows": "skip"}
    tally = Tally("skip")

    found = tokens([good[0], *bad, good[1]], tally, **settings)

    assert same(found, tokens(good, **settings))
    assert [example.labels for example in found] == [1, 0]
    assert (tally.count("dropped"), tally.count("skipped")) == (1, 1)


def test_bad_rows_does_not_stand_for_too_long() -> None:
    """Each of the two decides its own rows; both are said by name."""
    with pytest.raises(DataError, match="`too_long: cut`"):
        tokens([*GOOD, LONG_ANSWER], bad_rows="skip")
    with pytest.raises(DataError, match="row:3: completion is empty"):
        tokens([*GOOD, {"prompt": "a", "completion": ""}], too_long="drop")


def test_nothing_left_is_an_error_with_the_first_reason() -> None:
    """A data set of rows that are all dropped does not start a run."""
    with pytest.raises(DataError) as caught:
        tokens([LONG_PROMPT, LONG_PROMPT], too_long="cut")

    assert str(caught.value).startswith("row:1: holds no target among its first 16")
    assert str(caught.value).endswith("no row of the data is left: 2 dropped")


def test_a_validation_shard_is_read_by_the_same_rules(tmp_path: Path) -> None:
    """Its bad rows are skipped and counted as those of the training data are."""
    dev = tmp_path / "dev.jsonl"
    dev.write_text('{"instruction": "a", "output": "b"}\nnot json\n')
    config = DataConfig(validation=str(dev), alpaca="chat", bad_rows="skip")
    tally = Tally("skip")

    rows, held_out = load_data([{"instruction": "c", "output": "d"}, {}], config, 0, tally)

    assert [row.schema for row in (*rows, *held_out)] == ["chat", "chat"]
    assert tally.count("skipped") == 2


@pytest.mark.parametrize("path", [None, "a.jsonl", ("a.jsonl", "b/*.json")])
def test_a_config_comes_back_as_it_was_written(tmp_path: Path, path: Any) -> None:
    """One path, several or none, and the old name of refusing, survive a run's folder."""
    config = DataConfig(path=path, too_long="error", bad_rows="skip")
    file = tmp_path / "data.yaml"
    file.write_text(dump_config(config))

    assert load_config(DataConfig, file, env={}) == config
    assert config == DataConfig(path=path, too_long="refuse", bad_rows="skip")
