"""A survey as lines of a terminal: with colours, or with marks where there are none.

Samples are private: they are written for the person at this device, and nowhere else.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edge_sdk.data.tally import Fate
from edge_sdk.data.tokenize import Example
from edge_sdk.preview.survey import Survey, num_with_loss

NAME = 11  # columns of the names at the left
BAR = 40  # columns of the longest bar
BINS = 10
# Tokens shown of a long sample: from its beginning, around the first that carries loss, at its end.
HEAD, BEFORE, BEHIND, TAIL = 40, 20, 40, 20
# Tokens before one that decide how it is written, such as a blank or a letter of several tokens.
CONTEXT = 4
SHADES = {True: ("\033[97;48;5;22m", "\033[97;48;5;28m"), False: ("\033[2m", "\033[0m")}
RESET = "\033[0m"
OPEN, CLOSE = "{+", "+}"
BROKEN = "\ufffd"
MEANINGS: dict[Fate, str] = {
    "skipped": "cannot be used",
    "dropped": "too long",
    "cut": "too long, the first tokens are kept",
    "ignored": "Alpaca's input is not learned",
    "shortened": "the chat template leaves out a part of an answer",
    "seams": "other tokens where prompt and answer meet than in the text as a whole",
}


def draw(survey: Survey, tokenizer: Any, *, num_examples: int, width: int, colours: bool) -> str:
    """Return the survey as text.

    Args:
        survey: What was found.
        tokenizer: Writes the tokens.
        num_examples: Samples to show, spread over the data.
        width: Columns of a line.
        colours: Whether the terminal shows colours.
    """
    lines = list(_summary(survey, width))
    chosen = np.linspace(0, len(survey.examples) - 1, min(num_examples, len(survey.examples)))
    for number in sorted({int(place) for place in chosen}):
        lines += ["", *_sample(survey, survey.examples[number], tokenizer, width, colours)]
    if isinstance(survey.examples[0].labels, int):
        pass  # a class has its loss on the whole
    elif colours and num_examples:
        lines += ["", f"{SHADES[True][0]} carries loss {RESET} {SHADES[False][0]}does not{RESET}"]
    elif num_examples:
        lines += ["", f"{OPEN}carries loss{CLOSE}, | between tokens"]
    lines += ["", *_histogram(survey, width)]
    lines += _not_taken(survey, width)
    return "\n".join(lines)


def _summary(survey: Survey, width: int) -> Iterator[str]:
    tokens = sum(len(example.input_ids) for example in survey.examples)
    with_loss = sum(map(num_with_loss, survey.examples))
    used = f"{sum(survey.schemas.values()):,}"
    lost = [f"{survey.tally.count(fate):,} {fate}" for fate in MEANINGS if survey.tally.count(fate)]
    rows = "all rows" if survey.is_whole else f"the first {used} rows (--rows N looks at more)"
    facts = {
        "data": survey.name,
        "schema": ", ".join(f"{name} ({count:,})" for name, count in survey.schemas.items()),
        "rows": f"{rows}; {used} read, {len(survey.examples):,} samples"
        + "".join(f", {one}" for one in lost),
        "classes": _classes(survey),
        "tokens": f"{tokens:,}; {with_loss:,} carry loss ({with_loss / tokens:.1%})",
    }
    if isinstance(survey.examples[0].labels, int):
        facts["tokens"] = f"{tokens:,}"
    for name, text in facts.items():
        if text:
            yield _wrapped(name, text, width)


def _classes(survey: Survey) -> str:
    """Return the classes of a classifier, each with how many samples it has."""
    counts = Counter(e.labels for e in survey.examples if isinstance(e.labels, int))
    names = dict(enumerate(survey.classes))
    return ", ".join(f"{names.get(label, label)} ({counts[label]:,})" for label in sorted(counts))


def _wrapped(name: str, text: str, width: int) -> str:
    margin = " " * NAME
    return textwrap.fill(
        text,
        width,
        initial_indent=f"{name:<{NAME}}",
        subsequent_indent=margin,
        break_on_hyphens=False,
        break_long_words=False,
    )


# ---- samples -------------------------------------------------------------------------------------


def _sample(
    survey: Survey, example: Example, tokenizer: Any, width: int, colours: bool
) -> Iterator[str]:
    """Yield one sample: its place, then its tokens."""
    ids, labels = example.input_ids.tolist(), example.labels
    if isinstance(labels, int):
        name = f" ({survey.classes[labels]})" if labels < len(survey.classes) else ""
        yield f"{example.where}: {len(ids)} tokens, class {labels}{name}"
        is_target = [False] * len(ids)
    else:
        yield f"{example.where}: {len(ids)} tokens, {num_with_loss(example)} carry loss"
        is_target = [place > 0 and label >= 0 for place, label in enumerate(labels.tolist())]
    pieces = written_tokens(ids, tokenizer)
    line = _Line(width, colours)
    last = -1
    for place in _shown(is_target):
        if place > last + 1:
            line.gap(place - last - 1)
        line.add(pieces[place], is_target[place], place)
        last = place
    if last + 1 < len(ids):
        line.gap(len(ids) - last - 1)
    yield from line.finished()


def _shown(is_target: list[bool]) -> list[int]:
    """Return the positions of the tokens to show."""
    count = len(is_target)
    if count <= HEAD + BEFORE + BEHIND + TAIL:
        return list(range(count))
    first = is_target.index(True) if True in is_target else HEAD
    parts = [range(HEAD), range(first - BEFORE, first + BEHIND), range(count - TAIL, count)]
    return sorted({place for part in parts for place in part if 0 <= place < count})


def written_tokens(ids: list[int], tokenizer: Any) -> list[str]:
    """Return each token as it is written behind those before it.

    A letter that several tokens make is written at the last of them, the others are empty.
    """
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        before = _decoded(ids[max(0, start - CONTEXT) : start], tokenizer)
        now = _decoded(ids[max(0, start - CONTEXT) : end], tokenizer)
        if now.endswith(BROKEN) and end < len(ids) and end - start < CONTEXT:
            pieces.append("")
            continue
        pieces.append(now[len(before) :] if now.startswith(before) else now)
        start = end
    return pieces


def _decoded(ids: list[int], tokenizer: Any) -> str:
    if not ids:
        return ""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


class _Line:
    """Tokens in lines that are not too long."""

    def __init__(self, width: int, colours: bool) -> None:
        self._width, self._colours = width - 2, colours
        self._lines: list[str] = []
        self._now, self._columns = "", 0
        self._is_open: bool | None = None
        """Whether the token before carries loss; None at the beginning of a line."""

    def add(self, token: str, is_target: bool, place: int) -> None:
        """Write one token, in several lines where it is long."""
        text, ends = _visible(token), token.endswith("\n")
        while text:
            room = self._width - self._columns - len(OPEN + CLOSE) - 1
            if _columns(text) > room and self._columns:
                self._end()
                continue
            piece = text if _columns(text) <= room else text[: max(1, room // 2)]
            self._put(piece, is_target, place)
            text = text[len(piece) :]
        if ends:
            self._end()

    def gap(self, count: int) -> None:
        """Say that so many tokens are not shown."""
        self._end()
        self._lines.append(f"  ... {count:,} tokens ...")

    def finished(self) -> list[str]:
        """Return all lines."""
        self._end()
        return self._lines

    def _put(self, text: str, is_target: bool, place: int) -> None:
        self._columns += _columns(text)
        if self._colours:
            self._now += f"{SHADES[is_target][place % 2]}{text}{RESET}"
            return
        if is_target == self._is_open:
            mark = "|"
        else:
            mark = (CLOSE if self._is_open else "") + (OPEN if is_target else "")
        self._columns += len(mark)
        self._now += mark + text
        self._is_open = is_target

    def _end(self) -> None:
        if self._now:
            self._lines.append(f"  {self._now}{CLOSE if self._is_open else ''}")
        self._now, self._columns, self._is_open = "", 0, None


def _visible(text: str) -> str:
    """Return *text* without letters that would move the cursor or change colours."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _columns(text: str) -> int:
    """Return the columns that *text* takes in a terminal."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


# ---- lengths, and what was left out --------------------------------------------------------------


def _histogram(survey: Survey, width: int) -> Iterator[str]:
    """Yield how many samples have how many tokens, with the longest that may stay."""
    lengths = np.array(survey.lengths)
    edges = _edges(int(lengths.max()), survey.max_length)
    most = survey.max_length
    counts = [int(((lengths > low) & (lengths <= high)).sum()) for low, high in edges]
    digits = len(f"{edges[-1][1]:,}")
    room = max(10, min(BAR, width - 2 * digits - len(f"{max(counts):,}") - 9))
    limit = "no limit" if most is None else f"max_length {most:,}"
    head = f"tokens of {len(lengths):,} samples, before any was cut or dropped; {limit}"
    yield textwrap.fill(head, width)
    for (low, high), count in zip(edges, counts, strict=True):
        bar = "#" * -(-room * count // max(counts))
        yield f"  {low + 1:>{digits},} - {high:>{digits},}  {bar:<{room}}  {count:,}"
        if most == high:
            yield f"  {f' max_length {most:,} ':-^{2 * digits + room + 5}}"


def _edges(longest: int, most: int | None) -> list[tuple[int, int]]:
    """Return the bounds of bars of one width, of which one ends at *most*, if any reach it."""
    top = longest if most is None or longest < most else most
    width = max(1, -(-top // BINS))
    highs = [*range(width, top, width), top]
    if longest > top:
        # What is too long has few bars of its own, so that one endless row hides no others.
        far = max(1, -(-(longest - top) // (BINS // 2)))
        highs += [*range(top + far, longest, far), longest]
    return list(zip([0, *highs[:-1]], highs, strict=True))


def _not_taken(survey: Survey, width: int) -> Iterator[str]:
    """Yield the rows that were not taken as they stand, with the first places."""
    tally = survey.tally
    for fate, meaning in MEANINGS.items():
        if not (count := tally.count(fate)):
            continue
        yield ""
        yield f"{fate}: {count:,} ({meaning})"
        for reason in tally.first(fate):
            yield from _indented(_visible(reason), width)
        if count > len(tally.first(fate)):
            yield f"  and {count - len(tally.first(fate)):,} more"
    if survey.stops:
        yield ""
        remedies = []
        if tally.count("skipped") and survey.config.bad_rows == "refuse":
            remedies.append("`bad_rows: skip` leaves out what cannot be used")
        if tally.count("dropped") and survey.config.too_long == "refuse":
            remedies.append("`too_long: cut` or `drop` takes what is too long")
        yield textwrap.fill(f"A run refuses this data: {'; '.join(remedies)}.", width)


def _indented(text: str, width: int) -> Iterable[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
