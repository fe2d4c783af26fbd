"""Ids are those that the tokenizer gives a text itself, whichever way it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.data.encoding import Encoder
from edge_sdk.data.fast_tokenizer import PlainTokenizer

transformers = pytest.importorskip("transformers")

BASE = Path(__file__).parents[3] / "examples" / "base"
TOKENIZER: Any = transformers.AutoTokenizer.from_pretrained(BASE)
PLAIN = PlainTokenizer(BASE)


def one_by_one(texts: list[str]) -> list[list[int]]:
    """What transformers makes of each text alone."""
    return [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]


@given(st.lists(st.text(max_size=30), max_size=6), st.integers(1, 3))
def test_ids_are_those_of_transformers(texts: list[str], times: int) -> None:
    """Also where texts come several times, are empty, or hold any sign there is."""
    texts = [*texts * times, "<|endoftext|> a", ""]

    assert Encoder(TOKENIZER).texts(texts) == one_by_one(texts)
    assert Encoder(PLAIN).texts(texts) == one_by_one(texts)


def test_a_tokenizer_with_a_mind_of_its_own_is_asked_itself() -> None:
    """Whoever does more than to hand a text on, or splits special tokens, is not passed over."""

    class Loud(type(TOKENIZER)):  # type: ignore[misc]
        """Reads everything in capitals."""

        def __call__(self, text: Any, **options: Any) -> Any:
            """Shout."""
            loud = text.upper() if isinstance(text, str) else [t.upper() for t in text]
            return super().__call__(loud, **options)

    splitting = transformers.AutoTokenizer.from_pretrained(BASE, split_special_tokens=True)
    text = "the end <|endoftext|>"

    assert Encoder(Loud.from_pretrained(BASE)).texts([text]) == one_by_one([text.upper()])
    assert Encoder(splitting).texts([text]) == [splitting(text)["input_ids"]]


def test_what_others_have_set_cuts_and_pads_nothing() -> None:
    """A tokenizer that was last asked to cut and to pad gives whole texts."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(BASE)
    encoder = Encoder(tokenizer)
    tokenizer(["a", "b c d e f"], truncation=True, max_length=2, padding=True)
    texts = ["a", "the boat leaves at noon"]

    assert encoder.texts(texts) == one_by_one(texts)
