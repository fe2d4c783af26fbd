"""Numbers as a table of text: one a line, for spreadsheets, pandas and gnuplot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from coordinator.tracking.names import Moment, TrackedRun
from edge_sdk.files import open_private, storage_errors

NUMBERS = "numbers.csv"
COLUMNS = ("step", "time", "device", "name", "value")


class CsvTable:
    """Appends to `numbers.csv`; a number of the run has no device."""

    takes_live = False

    def open(self, about: TrackedRun) -> None:
        """Begin a table, or go on with the one that is there."""
        self._path = about.folder / NUMBERS
        if not self._path.exists():
            self._append([COLUMNS])

    def take(self, samples: Sequence[Moment]) -> None:
        """Write a line for each number."""
        self._append(
            [
                (sample.step, f"{sample.time_s:.3f}", number.device or "", number.name, value)
                for sample in samples
                for number in sample.numbers
                for value in [repr(number.value)]
            ]
        )

    def close(self, *, completed: bool) -> None:
        """Do nothing: every line is written."""

    def abandon(self) -> None:
        """Do nothing: none of its threads keeps a program."""

    def _append(self, rows: Sequence[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with storage_errors(self._path), open_private(self._path, "ab") as file:
            file.write(text.getvalue().encode())
