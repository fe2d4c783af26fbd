"""METEOR, ROUGE-L and CIDEr, as the scripts of MS-COCO's captions count them; see docs/scores.md.

Their tokenizer and METEOR are Java programs that come with the package `pycocoevalcap`; this drives
them itself: the package's own drivers write beside the package and wait without an end.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import IO, Any

from edge_sdk.errors import DataError, one_line

TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR = "meteor/meteor-1.5.jar"
# What is no word to the scripts, as the tokenizer writes it.
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-")
    + (".", "?", "!", ",", ":", "-", "--", "...", ";")
)
# Longest wait for one of the programs: minutes on a slow board for a large file, never for ever.
PATIENCE_S = 1800.0
MOST_MEMORY = "-Xmx2G"
BAR = "|||"
"""What METEOR's lines have between texts; the tokenizer makes three words of it."""

Texts = dict[str, list[str]]
"""What the scripts take: texts by the name of their input."""


def caption_scores(
    names: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return those of METEOR, ROUGE-L and CIDEr that are asked for.

    Raises:
        DataError: one of the programs has failed.
    """
    told = _tokenized([*hypotheses, *(text for own in references for text in own)])
    found, rest = told[: len(hypotheses)], iter(told[len(hypotheses) :])
    right = [[next(rest) for _ in own] for own in references]
    scores = {}
    if "meteor" in names:
        scores["meteor"] = _meteor(found, right)
    keyed: tuple[Texts, Texts] = (
        {str(n): own for n, own in enumerate(right)},
        {str(n): [text] for n, text in enumerate(found)},
    )
    for name, scorer in (("rouge_l", _rouge), ("cider", _cider)):
        if name in names:
            scores[name] = float(scorer().compute_score(*keyed)[0])
    return scores


def _rouge() -> Any:
    from pycocoevalcap.rouge.rouge import Rouge

    return Rouge()


def _cider() -> Any:
    from pycocoevalcap.cider.cider import Cider

    return Cider()


# ---- the programs ----


def _tokenized(texts: Sequence[str]) -> list[str]:
    """Return texts as words with a blank between them, in lower case and without punctuation."""
    # What else ends a line to the tokenizer would end one here: a text is one line.
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    words = ["-cp", TOKENIZER, "edu.stanford.nlp.process.PTBTokenizer"]
    with _java(
        [*words, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"], "the tokenizer"
    ) as java:
        found = java.communicate(lines)[0].split("\n")[:-1]
        if java.returncode:
            raise ChildProcessError(f"exit code {java.returncode}")
    if len(found) != len(texts):
        raise DataError(f"scores: the tokenizer made {len(found)} lines of {len(texts)}")
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in found
    ]


def _meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return METEOR 1.5 of the whole file, of words as `_tokenized` makes them."""
    counts = []
    with _java(
        [MOST_MEMORY, "-jar", METEOR, "-", "-", "-stdio", "-l", "en", "-norm"], "METEOR"
    ) as java:
        for text, own in zip(hypotheses, references, strict=True):
            counts.append(_answer(java, "SCORE", [*own, text]))
        last = _answer(java, "EVAL", counts)
        # The score of each text, of which this is the first, and that of all together.
        for _ in counts:
            last = _line(java)
        return float(last)


def _answer(java: subprocess.Popen[str], what: str, parts: Sequence[str]) -> str:
    assert java.stdin is not None
    java.stdin.write(f" {BAR} ".join((what, *parts)) + "\n")
    java.stdin.flush()
    return _line(java)


def _line(java: subprocess.Popen[str]) -> str:
    assert java.stdout is not None
    line = java.stdout.readline()
    if not line:
        raise BrokenPipeError("it ended before its answer")
    return line.strip()


@contextmanager
def _java(arguments: Sequence[str], what: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Java program beside the package's files; it is no more when this ends.

    Raises:
        DataError: it failed, or took longer than `PATIENCE_S`.
    """
    spec = find_spec("pycocoevalcap")
    assert spec is not None, "`require_programs` was asked first"
    assert spec.submodule_search_locations is not None
    folder = next(iter(spec.submodule_search_locations))
    command = ["java", "-Dfile.encoding=UTF-8", *arguments]
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile() as complaints:
        try:
            with subprocess.Popen(
                command, cwd=folder, stderr=complaints, encoding="utf-8", **piped
            ) as java:
                timer = threading.Timer(PATIENCE_S, java.kill)
                timer.start()
                try:
                    yield java
                finally:
                    timer.cancel()
                    java.kill()
        except (OSError, ValueError) as error:
            raise DataError(f"scores: {what} failed: {_why(complaints, error)}") from error


def _why(complaints: IO[bytes], error: Exception) -> str:
    """Return the last thing that a program has complained of, else what went wrong with it."""
    complaints.seek(0)
    lines = complaints.read().decode("utf-8", "replace").strip().splitlines()
    return one_line(lines[-1] if lines else error)
