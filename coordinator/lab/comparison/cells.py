"""Compared runs as values: what each evaluation cost, which rate a method keeps, what all reached.

Pure: a cell is one run, in values that JSON can hold. Knows no training, no tables and no plots.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from coordinator.lab.comparison.search.grid import best_rate

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
    energy_j: float = 0.0
    """Joules that all devices have spent."""

    @property
    def traffic_bytes(self) -> float:
        """Bytes of all devices, both ways."""
        return self.bytes_up + self.bytes_down


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
    """Predicted peak memory of each device, in bytes; None where it was not predicted."""
    trained: dict[str, int] | None = None
    """Most numbers in the adapters that each device held."""
    notes: tuple[str, ...] = ()
    rank_energy: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Round, and shares of the energy of dW within its 1, 2, 4, ... largest singular values."""
    traffic: dict[str, dict[str, int]] | None = None
    """What the bytes of all devices were in the whole run, by way and kind; None where unknown."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores of `evaluation.scores` at the end of the run, by name."""
    disturbance: str = ""
    """What it was disturbed by; empty for the runs that methods are compared by."""
    disturbed: tuple[str, ...] = ()
    """The devices that were."""
    is_central: bool = False
    """Whether it has no devices, so that neither bytes nor joules of theirs are known."""

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
    """Read what `cell_to_row` wrote; what else stands in the row is left out.

    What was no number was written as null.
    """
    return RunResult(
        **{
            **{each.name: row[each.name] for each in fields(RunResult) if each.name in row},
            "points": tuple(
                Point(*(math.nan if value is None else value for value in point))
                for point in row["points"]
            ),
            "held": tuple({d: Held(*h) for d, h in held.items()} for held in row["held"]),
            "importance": tuple((round_, values) for round_, values in row["importance"]),
            "notes": tuple(row["notes"]),
            "rank_energy": tuple((n, tuple(shares)) for n, shares in row.get("rank_energy", ())),
            "disturbed": tuple(row.get("disturbed", ())),
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
    return {group: best_rate(losses) for group, losses in tried_rates(cells).items()}


def tried_rates(cells: Sequence[RunResult]) -> dict[tuple[str, str], dict[float, float]]:
    """Return the final loss by rate of each method on the first seed, by device set."""
    plain = by_group([cell for cell in cells if not cell.disturbance])
    return {
        group: {cell.rate: cell.last.loss for cell in own if cell.seed == own[0].seed}
        for group, own in plain.items()
    }


def at_chosen_rates(cells: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs at each method's chosen rate, without those that were disturbed."""
    plain = [cell for cell in cells if not cell.disturbance]
    rates = best_rates(plain)
    return [cell for cell in plain if cell.rate == rates[cell.method, cell.device_set]]


def by_group(cells: Sequence[RunResult]) -> dict[tuple[str, str], list[RunResult]]:
    """Return the runs of each method on each set of devices, in the order of *cells*."""
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.device_set), []).append(cell)
    return groups


def common_target(cells: Sequence[RunResult]) -> float:
    """Return the lowest loss that every one of *cells* reached."""
    return max(cell.best_loss for cell in cells)


def score(point: Point, *, is_classifier: bool) -> float:
    """Perplexity, or accuracy in percent."""
    return 100 * point.accuracy if is_classifier else math.exp(min(point.loss, 700.0))
