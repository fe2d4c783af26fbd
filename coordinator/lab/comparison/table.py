"""The summary of compared runs: each method's learning rate, the loss to reach, a table.

Pure: cells in, rows and text out. A cell is one run. Knows no training, no plots and no HTML.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

# A cell is one of these for each device set, seed and rate.
Key = tuple[str, str, int, float]


class Point(NamedTuple):
    """State of a run when it was evaluated; everything is counted since its start."""

    samples: float
    modelled_s: float
    real_s: float
    """Seconds on the clock of the machine that simulated."""
    bytes_up: float
    bytes_down: float
    loss: float
    accuracy: float


class Held(NamedTuple):
    """What a device held in a round."""

    split: int
    rank: float
    """Mean rank over its weights; those without an adapter count as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run that has ended: all that a report needs, in values that JSON can hold."""

    method: str
    device_set: str
    seed: int
    rate: float
    points: tuple[Point, ...]
    """Its evaluations; the first is from before training."""
    held: tuple[dict[str, Held], ...] = ()
    """What each device held, round by round; empty without devices."""
    importance: tuple[tuple[int, dict[str, float]], ...] = ()
    """Round, and importance by weight after it, where that was measured."""
    peak_bytes: dict[str, float] | None = None
    """Predicted peak memory of each device, in bytes; None without devices."""
    trained: dict[str, int] | None = None
    """Most numbers in the adapters that each device held."""
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """Which of all runs it is."""
        return self.method, self.device_set, self.seed, self.rate

    @property
    def last(self) -> Point:
        """The last evaluation of the run."""
        return self.points[-1]

    @property
    def best_loss(self) -> float:
        """Lowest loss of any evaluation."""
        return min(point.loss for point in self.points)

    def reached(self, loss: float) -> Point | None:
        """Return when *loss* was reached, on the straight line between two evaluations."""
        if self.points[0].loss <= loss:
            return self.points[0]
        for before, after in zip(self.points, self.points[1:], strict=False):
            if before.loss > loss >= after.loss:
                part = (before.loss - loss) / (before.loss - after.loss)
                return Point(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))
        return None


def cell_to_row(cell: RunResult) -> dict[str, Any]:
    """Write a cell as a line of cells.jsonl."""
    return asdict(cell)


def cell_from_row(row: Mapping[str, Any]) -> RunResult:
    """Read what `cell_to_row` wrote."""
    return RunResult(
        **{
            **row,
            "points": tuple(Point(*point) for point in row["points"]),
            "held": tuple({d: Held(*h) for d, h in held.items()} for held in row["held"]),
            "importance": tuple((round_, values) for round_, values in row["importance"]),
            "notes": tuple(row["notes"]),
        }
    )


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds (0 for one)."""

    mean: float
    deviation: float
    num_seeds: int

    def text(self, digits: int) -> str:
        """Return `1.234 +- 0.005`; one seed has no deviation."""
        mean = f"{self.mean:,.{digits}f}"
        return mean if self.num_seeds < 2 else f"{mean} \u00b1 {self.deviation:.{digits}f}"


def spread(values: Iterable[float]) -> Spread:
    """Return mean and deviation of at least one value."""
    numbers = list(values)
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return Spread(statistics.fmean(numbers), deviation, len(numbers))


# ---- which runs count ----


def best_rates(cells: Sequence[RunResult]) -> dict[tuple[str, str], float]:
    """Return each method's rate with the lowest final loss on the first seed, by device set."""
    tried: dict[tuple[str, str], list[RunResult]] = {}
    for cell in cells:
        tried.setdefault((cell.method, cell.device_set), []).append(cell)
    rates = {}
    for group, own in tried.items():
        first = [cell for cell in own if cell.seed == own[0].seed]
        rates[group] = min(first, key=_final).rate
    return rates


def _final(cell: RunResult) -> float:
    return cell.last.loss if math.isfinite(cell.last.loss) else math.inf


def at_chosen_rates(cells: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs at each method's chosen rate."""
    rates = best_rates(cells)
    return [cell for cell in cells if cell.rate == rates[cell.method, cell.device_set]]


def common_target(cells: Sequence[RunResult]) -> float:
    """Return the lowest loss that every one of *cells* reached."""
    return max(cell.best_loss for cell in cells)


# ---- rows ----


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One method on one set of devices, over all seeds."""

    method: str
    device_set: str
    rate: float
    rate_is_extreme: bool
    """Whether its rate is the smallest or largest that was tried: others might do better."""
    samples: int
    loss: Spread
    score: Spread
    """Perplexity, or accuracy in percent."""
    modelled_s: Spread | None
    """Seconds to the target, over the runs that reached it; None if none did."""
    real_s: Spread | None
    num_reached: int
    bytes_up: float
    """Bytes sent and received for a sample."""
    bytes_down: float
    peak_bytes: tuple[float, float] | None
    """Predicted peak memory of the smallest and of the largest device; None without devices."""
    trained: tuple[int, int] | None
    notes: tuple[str, ...]


def make_rows(cells: Sequence[RunResult], target: float, *, is_classifier: bool) -> list[TableRow]:
    """Return a row for each method and device set, in the order of the cells."""
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for cell in at_chosen_rates(cells):
        groups.setdefault((cell.method, cell.device_set), []).append(cell)
    tried: dict[tuple[str, str], set[float]] = {}
    for cell in cells:
        tried.setdefault((cell.method, cell.device_set), set()).add(cell.rate)
    return [
        _row(own, sorted(tried[group]), target, is_classifier=is_classifier)
        for group, own in groups.items()
    ]


def _row(
    own: list[RunResult], rates: list[float], target: float, *, is_classifier: bool
) -> TableRow:
    first = own[0]
    reached = [point for cell in own if (point := cell.reached(target)) is not None]
    return TableRow(
        method=first.method,
        device_set=first.device_set,
        rate=first.rate,
        rate_is_extreme=len(rates) > 1 and first.rate in (rates[0], rates[-1]),
        samples=round(max(cell.last.samples for cell in own)),
        loss=spread(cell.last.loss for cell in own),
        score=spread(score(cell.last, is_classifier=is_classifier) for cell in own),
        modelled_s=spread(p.modelled_s for p in reached) if reached else None,
        real_s=spread(p.real_s for p in reached) if reached else None,
        num_reached=len(reached),
        bytes_up=statistics.fmean(c.last.bytes_up / c.last.samples for c in own),
        bytes_down=statistics.fmean(c.last.bytes_down / c.last.samples for c in own),
        peak_bytes=_range(cell.peak_bytes for cell in own),
        trained=_range(cell.trained for cell in own),
        notes=tuple(dict.fromkeys(note for cell in own for note in cell.notes)),
    )


def score(point: Point, *, is_classifier: bool) -> float:
    """Perplexity, or accuracy in percent."""
    return 100 * point.accuracy if is_classifier else math.exp(min(point.loss, 700.0))


def _range(by_device: Iterable[Mapping[str, Any] | None]) -> tuple[Any, Any] | None:
    values = [value for each in by_device if each for value in each.values()]
    return (min(values), max(values)) if values else None


# ---- the table ----

NOTHING = "\u2013"


def column_titles(target: float, *, is_classifier: bool) -> tuple[str, ...]:
    """Return the titles of the table's columns."""
    return (
        "method",
        "devices",
        "learning rate",
        "samples",
        "loss",
        "accuracy (%)" if is_classifier else "perplexity",
        f"modelled time to loss {target:.4g} (s)",
        "simulated in (s)",
        "up per sample (kB)",
        "down per sample (kB)",
        "device peak, predicted (MiB)",
        "trained on a device",
    )


def row_texts(row: TableRow, *, is_classifier: bool) -> tuple[str, ...]:
    """Return one row as texts."""
    has_devices = row.peak_bytes is not None
    return (
        row.method,
        row.device_set,
        f"{row.rate:g}" + (" (edge of the grid)" if row.rate_is_extreme else ""),
        f"{row.samples:,}",
        row.loss.text(4),
        row.score.text(2 if is_classifier else 3),
        _time(row.modelled_s, row),
        _time(row.real_s, row),
        f"{row.bytes_up / 1e3:,.1f}" if has_devices else NOTHING,
        f"{row.bytes_down / 1e3:,.1f}" if has_devices else NOTHING,
        _span(row.peak_bytes, 2**20, 1),
        _span(row.trained, 1, 0),
    )


def _time(spread: Spread | None, row: TableRow) -> str:
    if spread is None:
        return "not reached"
    missing = row.loss.num_seeds - row.num_reached
    return spread.text(1) + (f" ({missing} of {row.loss.num_seeds} not reached)" if missing else "")


def _span(values: tuple[float, float] | None, unit: float, digits: int) -> str:
    if values is None:
        return NOTHING
    texts = [f"{value / unit:,.{digits}f}" for value in values]
    return texts[0] if texts[0] == texts[1] else "\u2013".join(texts)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
