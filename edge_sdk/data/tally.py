"""What became of the rows that were not taken as they stood: skipped, dropped or cut, and why.

Reasons name places and never quote a sample.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Literal

from edge_sdk.errors import DataError

log = logging.getLogger(__name__)

Fate = Literal["skipped", "dropped", "cut", "ignored", "shortened", "seams"]
LOST: tuple[Fate, ...] = ("skipped", "dropped", "cut")
# Trained, but not as somebody may expect: `columns` leave out Alpaca's input; the chat template
# leaves out a part of an answer; prompt and answer tokenised at once would have other tokens than
# those that the model is served.
FATES: tuple[Fate, ...] = (*LOST, "ignored", "shortened", "seams")
IN_WORDS: dict[Fate, str] = {
    "skipped": "skipped",
    "dropped": "dropped, too long",
    "cut": "cut, too long",
    "ignored": "not taken whole",
    "shortened": "shortened by the chat template",
    "seams": "with other tokens at the seam of prompt and answer",
}
# Reasons that a log line names; the places of thousands help nobody.
FIRST = 3


class Tally:
    """Counts of one data set, with the first reasons of each kind."""

    def __init__(self, on_bad: Literal["refuse", "skip"] = "refuse") -> None:
        """Begin at zero.

        Args:
            on_bad: Whether `bad` raises what it is given or counts it.
        """
        self._on_bad = on_bad
        self._counts: dict[Fate, int] = dict.fromkeys(FATES, 0)
        self._first: dict[Fate, list[str]] = {fate: [] for fate in FATES}
        self.schemas = Counter[str]()
        """Rows by the name of their schema."""
        self.lengths = array("I")
        """Tokens of each sample before it was cut or dropped."""

    def count(self, fate: Fate) -> int:
        """Return how many rows had that *fate*."""
        return self._counts[fate]

    def first(self, fate: Fate) -> list[str]:
        """Return the first reasons, at most FIRST, each beginning with its place."""
        return self._first[fate]

    def add(self, fate: Fate, reason: str) -> None:
        """Count a row; *reason* begins with its place."""
        self._counts[fate] += 1
        if len(self._first[fate]) < FIRST:
            self._first[fate].append(reason)

    def bad(self, error: DataError) -> None:
        """Count a row that cannot be used, or refuse all of its data set.

        Raises:
            DataError: *error*, unless bad rows are skipped.
        """
        if self._on_bad == "refuse":
            raise error
        self.add("skipped", str(error))

    def refuse_empty(self, what: str) -> DataError:
        """Return the error for *what* of which no row is left."""
        reasons = [reason for fate in LOST for reason in self._first[fate]]
        if not reasons:
            return DataError(f"{what}: holds no rows")
        lost = ", ".join(f"{self._counts[f]} {f}" for f in LOST if self._counts[f])
        return DataError(f"{reasons[0]}; no row of {what} is left: {lost}")

    def say(self, tell: Callable[[str], None] | None = None) -> None:
        """Say how many rows were not taken as they stood, a line for each kind.

        Args:
            tell: Tells a person who sees no log at this level; None: the log warns.
        """
        level = logging.WARNING if tell is None else logging.INFO
        for fate in FATES:
            if count := self._counts[fate]:
                first = "; ".join(self._first[fate])
                log.log(level, "data.%s rows=%d first=%s", fate, count, first)
                if tell is not None:
                    tell(f"{count:,} {'rows' if count > 1 else 'row'} {IN_WORDS[fate]}: {first}")
