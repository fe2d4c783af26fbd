"""Where texts begin, join and end: each special token once, and the served ids at every seam."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.fast_tokenizer import PlainTokenizer
from edge_sdk.data.rows import DataConfig
from tests.edge_sdk.data.template_cases import (
    TOKENIZERS,
    both_tokenizers,
    examples_of,
    tokenizer_folder,
)

KINDS = sorted(TOKENIZERS)
BOS, EOS = 0, 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "record",
    [
        {"text": "<s>The boat leaves.</s>"},
        {"text": "<s> The boat leaves. </s>"},
        {"text": "<s>The boat leaves.</s>\n"},
        {"text": "The boat leaves."},
        {"text": "The boat leaves.</s>"},
        {"prompt": "<s>[INST] The boat? [/INST]", "completion": " It leaves.</s>"},
        {"prompt": "The boat?", "completion": "It leaves."},
    ],
)
def test_no_text_begins_or_ends_twice(kind: str, record: dict[str, str]) -> None:
    """A text that was rendered with its special tokens gets no second ones, others get one."""
    for tokenizer in both_tokenizers(kind):
        (example,) = examples_of(record, tokenizer)

        ids = example.input_ids.tolist()
        assert (ids[0], ids.count(BOS), ids.count(EOS)) == (BOS, 1, 1)
        assert EOS in ids[-3:], "a line end of two tokens at most may follow"
        assert np.asarray(example.labels).tolist().count(EOS) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_within_a_text_is_no_end_of_it(kind: str) -> None:
    """Documents joined by the end-of-text token still get one after the last."""
    for tokenizer in both_tokenizers(kind):
        (example,) = examples_of({"text": "One.</s>Two."}, tokenizer)

        assert example.input_ids.tolist().count(EOS) == 2
        assert example.input_ids[-1] == EOS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separator", ["\n", " ", ""])
@pytest.mark.parametrize("completion", ["boat", " boat", "\nboat", "\n\nboat  at noon"])
def test_a_completion_goes_on_as_it_is_written(kind: str, separator: str, completion: str) -> None:
    """The ids are those of the prompt as it is served, and the text is that of the data.

    SentencePiece would put a blank before a completion that is tokenised alone.
    """
    config = DataConfig(separator=separator, append_eos=False)
    prompt = "Where is the old"
    found = []
    for tokenizer in both_tokenizers(kind):
        (example,) = examples_of({"prompt": prompt, "completion": completion}, tokenizer, config)
        found.append((example.input_ids.tolist(), np.asarray(example.labels).tolist()))
    reference = both_tokenizers(kind)[0]

    ids, labels = found[0]
    served = reference(prompt + separator)["input_ids"]
    assert found[1] == found[0]
    assert ids[: len(served)] == served
    assert labels == [IGNORE] * len(served) + ids[len(served) :]
    assert reference.decode(ids) == reference.decode(served[:1]) + written(
        reference, prompt + separator + completion
    )


def written(tokenizer: Any, text: str) -> str:
    """Return *text* as the tokenizer writes it back, without its first token."""
    whole: str = tokenizer.decode(tokenizer(text)["input_ids"])
    return whole.removeprefix(tokenizer.bos_token)


@pytest.mark.parametrize("kind", KINDS)
def test_seams_that_tokenise_differently_are_counted(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt whose last letters would join the answer's first is trained as it is served."""
    config = DataConfig(separator="")
    record = {"prompt": "The bo", "completion": "at leaves at noon."}
    tokenizer, _ = both_tokenizers(kind)
    at_once = tokenizer(record["prompt"] + record["completion"])["input_ids"]

    (example,) = examples_of(record, tokenizer, config)

    assert example.input_ids.tolist()[:-1] != at_once
    assert "data.seams rows=1 first=row:1: prompt and answer have other tokens" in caplog.text
    caplog.clear()
    examples_of({"prompt": "The boat?", "completion": "Zero."}, tokenizer)
    assert "data.seams" not in caplog.text


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_eos_token": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_the_tokenizer_hold_without_transformers(
    kind: str, settings: dict[str, bool], tmp_path: Any
) -> None:
    """What tokenizer_config.json says of the first and the last token is the same on any device."""
    import json
    import shutil

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder(kind) / name, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | settings), "utf-8")
    reference, plain = AutoTokenizer.from_pretrained(tmp_path), PlainTokenizer(tmp_path)

    assert plain("The boat.")["input_ids"] == reference("The boat.")["input_ids"]
