"""The one reader of a run's folder: what was measured, what it cost, what was planned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from coordinator.results.plan_rows import unpacked
from coordinator.results.run_folder import CLOCK, TEST_RESULTS, RunFolder
from coordinator.results.session_counters import DOWN, UP, SessionCounters

Row = Mapping[str, Any]
_ENDS_WAITING = ("run.started", "run.ended", "round.started", "round.deadline")


class LossAccuracy(NamedTuple):
    """How well a model does on some data."""

    loss: float
    """Mean over targets."""
    accuracy: float


class DeviceCosts(NamedTuple):
    """What a device has done in a run, or in its first rounds."""

    tokens: int
    compute_s: float
    bytes_up: int
    bytes_down: int
    peak_bytes: int
    """Most memory of its program."""


class RunHistory:
    """What a run has left behind; files are read when they are first asked for."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl: row 0 is what was there before training."""
        return self._folder.rows("metrics.jsonl")

    @cached_property
    def costs(self) -> list[dict[str, Any]]:
        """Rows of telemetry.jsonl, one a round."""
        return self._folder.rows("telemetry.jsonl")

    @cached_property
    def plans(self) -> list[dict[str, Any]]:
        """Rows of plans.jsonl, one whenever something was planned, with ranks by weight."""
        return [unpacked(row) for row in self._folder.rows("plans.jsonl")]

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Rows of events.jsonl, oldest first."""
        return self._folder.rows("events.jsonl")

    def waiting(self) -> dict[str, Row]:
        """Return whom the run waits for now, for `what`, and `since` when, by device."""
        found: dict[str, Row] = {}
        for row in self.events:
            kind = row["event"]
            if kind == "waiting":
                since = _before(row["time"], row["seconds"])
                new = {name: {"what": row["what"], "since": since} for name in row["devices"]}
                found = {**new, **found}
            elif kind == "round.held":
                what = f"round {row['round'] + 1}, which is saved at step {row['step']}"
                new = {name: {"what": what, "since": row["time"]} for name in row["devices"]}
                found = {**new, **found}
            elif kind in ("waiting.over", "device.left"):
                found.pop(row["device"], None)
            elif kind in _ENDS_WAITING:
                found = {}
        return found

    def missing(self) -> Row | None:
        """Return what is known of the devices that a round lacks, as its event says; else None."""
        found = None
        for row in self.events:
            if row["event"] == "devices.missing":
                found = row
            elif row["event"] in _ENDS_WAITING:
                found = None
        return found

    def tours(self) -> Row | None:
        """Return the last merge of a run without a barrier, as its event says; else None."""
        return next((r for r in reversed(self.events) if r["event"] == "tours.merged"), None)

    def test(self) -> Row | None:
        """Return what the result does on the test file, as transformers names it; else None."""
        return next(iter(self._folder.rows(TEST_RESULTS)), None)

    @property
    def rounds_done(self) -> int:
        """Aggregations of which the row is complete."""
        return self.metrics[-1]["round"] if self.metrics else 0

    def samples(self) -> dict[int, int]:
        """Count the samples trained on since the start, by rounds done."""
        counts = accumulate(row.get("samples", 0) for row in self.metrics)
        return {row["round"]: count for row, count in zip(self.metrics, counts, strict=True)}

    def seconds(self) -> dict[int, float]:
        """Sum the seconds of training on this machine since the start, by rounds done."""
        ends = accumulate((row["seconds"] for row in self.costs), initial=0.0)
        return dict(zip([0, *(row["round"] + 1 for row in self.costs)], ends, strict=True))

    def traffic(self) -> dict[int, tuple[int, int]]:
        """Sum the bytes up and down of all devices since the start, by rounds done."""
        found = {}
        counters = SessionCounters[int]()
        for row in self.costs:
            for name, mine in row["devices"].items():
                counters.take(name, _ways(mine))
            found[row["round"] + 1] = counters.total(UP), counters.total(DOWN)
        return found

    def devices(self) -> list[str]:
        """Return the names of all devices that have trained, sorted."""
        return sorted({name for row in self.costs for name in row["devices"]})

    def cost(
        self, device: str, rounds: int | None = None, now: tuple[int, int] = (0, 0)
    ) -> DeviceCosts:
        """Sum what *device* did before *rounds* rounds were over; None: in the whole run.

        Args:
            device: Its name.
            rounds: Rounds that count.
            now: Bytes up and down that were counted since the last of them; 0: nothing is known.
        """
        rows = (row for row in self.costs if rounds is None or row["round"] < rounds)
        own = [row["devices"][device] for row in rows if device in row["devices"]]
        counters = SessionCounters[int]()
        for counts in (*map(_ways, own), {UP: now[0], DOWN: now[1]} if any(now) else {}):
            counters.take(device, counts)
        bytes_ = counters.sums(device)
        return DeviceCosts(
            tokens=sum(row.get("tokens", 0) for row in own),
            compute_s=sum(row.get("compute_s", 0.0) for row in own),
            bytes_up=bytes_.get(UP, 0),
            bytes_down=bytes_.get(DOWN, 0),
            peak_bytes=max((row["peak_bytes"] for row in own), default=0),
        )

    def plans_in(self, round_: int) -> Mapping[str, Row]:
        """Return the plan of each device in a round; empty where nothing was planned for it."""
        return next((r["plans"] for r in reversed(self.plans) if r["round"] <= round_), {})

    def first_scores(self) -> dict[str, Row]:
        """Return the scores before training: of the coordinator's `file`, and by device."""
        return scores(self.metrics[0]) if self.metrics else {}

    def last_scores(self) -> dict[str, Row]:
        """Return the newest score of the coordinator's `file` and of each device."""
        return {who: score for row in self.metrics for who, score in scores(row).items()}


def scores(row: Row) -> dict[str, Row]:
    """Return the scores in a row of metrics: of the coordinator's `file`, and by device.

    What was no number when it was measured, and stands there as null, is NaN.
    """
    found = {**({"file": row["eval"]} if "eval" in row else {}), **row.get("eval_by_device", {})}
    return {who: _numbers(score) for who, score in found.items()}


def overall(row: Row) -> LossAccuracy | None:
    """Return the score on the coordinator's file, or over the devices' data, each target alike."""
    by_name = scores(row)
    found = [by_name["file"]] if "file" in by_name else [*by_name.values()]
    targets = sum(score["targets"] for score in found)
    if not targets:
        return None
    loss, accuracy = (
        sum(score[key] * score["targets"] for score in found) / targets
        for key in ("loss", "accuracy")
    )
    return LossAccuracy(loss, accuracy)


def _before(time: str, seconds: float) -> str:
    """Return a clock time of events.jsonl less some *seconds*."""
    earlier = datetime.strptime(time, CLOCK) - timedelta(seconds=seconds)
    return earlier.strftime(CLOCK)


def _numbers(score: Row) -> Row:
    return {key: math.nan if value is None else value for key, value in score.items()}


def _ways(costs: Row) -> dict[str, int]:
    """Return the bytes up and down of a device's part of a row, as far as it has them."""
    return {way: costs[way] for way in (UP, DOWN) if way in costs}
