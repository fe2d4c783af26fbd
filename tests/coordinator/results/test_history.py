"""A run's folder is read in one place, and the figures are those that its lines add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.results.history import DeviceCosts, LossAccuracy, RunHistory, overall
from coordinator.results.run_folder import RunFolder


def score(loss: float, targets: int, accuracy: float = 0.5) -> dict[str, float]:
    """One evaluation."""
    return {"loss": loss, "targets": targets, "accuracy": accuracy}


def costs(up: int, peak: int) -> dict[str, float]:
    """What a device reports after a round."""
    return {
        "tokens": 10,
        "compute_s": 0.5,
        "wait_s": 0.1,
        "peak_bytes": peak,
        "bytes_up": up,
        "bytes_down": 2 * up,
    }


@pytest.fixture
def history(tmp_path: Path) -> RunHistory:
    """Three rounds; device a begins a new session in the last, device b comes in the second."""
    folder = RunFolder.create(tmp_path, "run")
    rows: list[dict[str, Any]] = [
        {"round": 0, "eval": score(4.0, 2)},
        {"round": 1, "samples": 8, "eval_by_device": {"a": score(3.0, 1), "b": score(1.0, 3, 1.0)}},
        {"round": 2, "samples": 12},
        {"round": 3, "samples": 4, "eval": score(2.0, 2)},
    ]
    devices = [
        {"a": costs(100, 5)},
        {"a": costs(250, 9), "b": costs(40, 3)},
        {"a": costs(30, 7), "b": {"peak_bytes": 4}},
    ]
    for row in rows:
        folder.append("metrics.jsonl", row)
    for number, by_device in enumerate(devices):
        row = {"round": number, "seconds": number + 0.5, "devices": by_device}
        folder.append("telemetry.jsonl", row)
    for first, split in ((0, 1), (2, 3)):
        folder.append("plans.jsonl", {"round": first, "plans": {"a": {"split": split}}})
    return RunHistory(folder)


def test_costs_are_sums_over_rounds_and_sessions(history: RunHistory) -> None:
    """Counters that begin anew with a session are joined; a part of the run can be asked for."""
    assert history.devices() == ["a", "b"]
    assert history.cost("a") == DeviceCosts(30, 1.5, 280, 560, 9)
    assert history.cost("a", 1) == DeviceCosts(10, 0.5, 100, 200, 5)
    assert history.cost("nobody") == DeviceCosts(0, 0, 0, 0, 0)
    assert history.traffic() == {1: (100, 200), 2: (290, 580), 3: (320, 640)}


def test_what_was_done_is_counted_from_the_start(history: RunHistory) -> None:
    """Samples and seconds by rounds done, 0 before the first."""
    assert history.rounds_done == 3
    assert history.samples() == {0: 0, 1: 8, 2: 20, 3: 24}
    assert history.seconds() == {0: 0.0, 1: 0.5, 2: 2.0, 3: 4.5}


def test_scores_before_and_after(history: RunHistory) -> None:
    """The first row's scores, and the newest of everybody whatever row has it."""
    assert history.first_scores() == {"file": score(4.0, 2)}
    assert history.last_scores() == {
        "file": score(2.0, 2),
        "a": score(3.0, 1),
        "b": score(1.0, 3, 1.0),
    }


def test_every_target_counts_once(history: RunHistory) -> None:
    """Over devices the score is a mean over their targets; without an evaluation there is none."""
    assert list(map(overall, history.metrics)) == [
        LossAccuracy(4.0, 0.5),
        LossAccuracy(1.5, 0.875),
        None,
        LossAccuracy(2.0, 0.5),
    ]


def test_plans_hold_until_the_next(history: RunHistory) -> None:
    """A round has the newest plans that were made for it or before it."""
    splits = [history.plans_in(round_)["a"]["split"] for round_ in range(4)]

    assert splits == [1, 1, 3, 3]
    assert history.plans_in(-1) == {}


def test_an_empty_folder_has_an_empty_history(tmp_path: Path) -> None:
    """A run that has just begun can be asked everything."""
    history = RunHistory(RunFolder.create(tmp_path, "run"))

    assert (history.rounds_done, history.events, history.devices()) == (0, [], [])
    assert (history.first_scores(), history.last_scores(), history.samples()) == ({}, {}, {})
    assert history.seconds() == {0: 0.0}


WAITS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "named": ([], {"b": {"what": "step 3", "since": "2026-01-01T00:00:00+0000"}}),
    "answered": ([{"event": "waiting.over", "device": "b"}], {}),
    "left": ([{"event": "device.left", "device": "b"}], {}),
    "another one left": (
        [{"event": "device.left", "device": "c"}],
        {"b": {"what": "step 3", "since": "2026-01-01T00:00:00+0000"}},
    ),
    "held": (
        [{"event": "round.held", "round": 1, "step": 7, "devices": ["c"]}],
        {
            "b": {"what": "step 3", "since": "2026-01-01T00:00:00+0000"},
            "c": {
                "what": "round 2, which is saved at step 7",
                "since": "2026-01-01T00:00:40+0000",
            },
        },
    ),
    "the next round": ([{"event": "round.started"}], {}),
    "the end": ([{"event": "run.ended"}], {}),
}


@pytest.mark.parametrize(("rows", "waiting"), WAITS.values(), ids=WAITS)
def test_whom_a_run_waits_for_is_read_from_its_events(
    tmp_path: Path, rows: list[dict[str, Any]], waiting: dict[str, Any]
) -> None:
    """Since when, however often it was told of; until it answers, leaves, or the run goes on."""
    folder = RunFolder.create(tmp_path, "run")
    for second in (15, 30):
        folder.append(
            "events.jsonl",
            {
                "time": f"2026-01-01T00:00:{second}+0000",
                "event": "waiting",
                "what": "step 3",
                "devices": ["b"],
                "seconds": float(second),
            },
        )
    for row in rows:
        folder.append("events.jsonl", {"time": "2026-01-01T00:00:40+0000", **row})

    assert RunHistory(folder).waiting() == waiting


def test_what_a_round_lacks_is_read_from_its_events(tmp_path: Path) -> None:
    """Until the round begins."""
    folder = RunFolder.create(tmp_path, "run")
    row = {"event": "devices.missing", "round": 1, "ready": ["a"], "least": 2, "why": {"b": "left"}}
    folder.append("events.jsonl", row)
    before = RunHistory(folder).missing()
    folder.append("events.jsonl", {"event": "round.started"})

    assert before == row
    assert RunHistory(folder).missing() is None
