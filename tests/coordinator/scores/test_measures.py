"""Scores of a whole file: asked for by name, refused in one line where they cannot be had."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from coordinator.scores import measures
from coordinator.scores.measures import require_programs, score_classes, score_texts
from edge_sdk.errors import ConfigError, DataError


def test_what_is_asked_for_is_counted() -> None:
    """Scores come by name, in the order of the table, and no others."""
    found = score_texts(
        ("nist", "bleu"), ["a cheap pub by the river"], [["a cheap pub by a river"]]
    )

    assert list(found) == ["bleu", "nist"]
    assert list(score_classes(("mcc", "f1"), [0, 1], [0, 1], 2).items()) == [
        ("f1", 1.0),
        ("mcc", 1.0),
    ]


@pytest.mark.parametrize(
    ("texts", "references", "why"),
    [
        ([], [], "there are no texts"),
        (["a"], [[]], "input 1 has no reference"),
        (["a", "b"], [["a"], [" "]], "input 2 has no reference"),
        (["a"], [["a"], ["b"]], "1 texts, but 2 inputs"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    texts: list[str], references: list[list[str]], why: str
) -> None:
    """Without texts or references there is one clear line instead of a number."""
    with pytest.raises(DataError, match=f"^scores: {why}$"):
        score_texts(("bleu",), texts, references)


def test_no_rows_have_no_scores() -> None:
    """Classes of no rows are refused."""
    with pytest.raises(DataError, match="there are no rows"):
        score_classes(("mcc",), [], [], 2)


def test_what_is_missing_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package or Java is named, with the scores that need it and what to do."""
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bleu, nist needs sacrebleu.*edgesplit\[scores\]"):
        require_programs(("bleu", "nist", "meteor"))
    require_programs(("f1", "mcc"))
    require_programs(())

    monkeypatch.setattr(measures, "find_spec", find_spec)
    monkeypatch.setattr(measures.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="meteor, cider needs Java"):
        require_programs(("bleu", "meteor", "cider"))
