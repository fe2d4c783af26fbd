"""Losses and scores over rounds, samples, seconds and bytes, and how much each weight matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import quantiles
from typing import Any, TypeVar

from coordinator.page.weights import place_of
from coordinator.results.history import Row, RunHistory, overall, scores

T = TypeVar("T")

# Points of a curve, devices that have a curve each, columns and rows of the heat map.
MOST_POINTS, MOST_LINES, MOST_COLUMNS, MOST_WEIGHTS = 400, 12, 80, 600


def thin(rows: Sequence[T], most: int) -> list[T]:
    """Return at most *most* of *rows*, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(n * (len(rows) - 1) / (most - 1))] for n in range(most)]


def curves(history: RunHistory, clock: Sequence[Row] = ()) -> dict[str, Any]:
    """Return a row for each round, and what each device has measured where they are few.

    Args:
        history: The run.
        clock: Rows of a simulation's modelled clock.
    """
    modelled = {0: 0.0, **{row["round"]: row["seconds"] for row in clock}} if clock else {}
    samples, seconds, traffic = history.samples(), history.seconds(), history.traffic()
    rows = thin(history.metrics, MOST_POINTS)
    points = []
    for row in rows:
        done, score = row["round"], overall(row)
        up, down = traffic.get(done, (None, None)) if done else (0, 0)
        points.append(
            {
                "round": done,
                "step": row.get("step"),
                "samples": samples.get(done),
                "seconds": seconds.get(done),
                "modelled": modelled.get(done),
                "up": up,
                "down": down,
                "train": row.get("train_loss"),
                "eval": None if score is None else score.loss,
                "accuracy": None if score is None else score.accuracy,
            }
        )
    train = [row.get("train_loss_by_device", {}) for row in rows]
    evals = [_losses(row) for row in rows]
    return {
        "points": points,
        "eval_on": "the coordinator's file" if any("eval" in r for r in rows) else "devices' data",
        "train": _by_device(train),
        "eval": _by_device(evals),
    }


def _losses(row: Row) -> dict[str, float]:
    return {who: score["loss"] for who, score in scores(row).items() if who != "file"}


def _by_device(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Return a line for each device; where they are many, low, middle and high tenths of them."""
    names = sorted({name for row in rows for name in row})
    if len(names) <= MOST_LINES:
        return {"lines": {name: [row.get(name) for row in rows] for name in names}}
    return {"band": [_tenths(row) for row in rows], "devices": len(names)}


def _tenths(row: Mapping[str, float | None]) -> tuple[float, float, float] | None:
    values = [value for value in row.values() if value is not None and value == value]
    if len(values) < 2:
        return None
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


def importance(history: RunHistory, rows: Sequence[Row]) -> dict[str, Any]:
    """Return how much each weight matters, by weight and rounds done; empty where none is known."""
    found = {row["round"]: row["importance"] for row in _importances(history, rows)}
    rounds = thin(sorted(found), MOST_COLUMNS)
    weights = sorted({weight for done in rounds for weight in found[done]}, key=_order)
    weights = weights[:MOST_WEIGHTS]
    return {
        "rounds": rounds,
        "weights": [_short(weight) for weight in weights],
        "values": [[found[done].get(weight) for done in rounds] for weight in weights],
    }


def _importances(history: RunHistory, rows: Sequence[Row]) -> Iterator[Row]:
    for row in (*history.plans, *rows):
        if row.get("importance"):
            yield row


def _order(weight: str) -> tuple[int, str]:
    return place_of(weight) or (1 << 30, weight)


def _short(weight: str) -> str:
    place = place_of(weight)
    return weight if place is None else f"{place[0]} {place[1]}"
