"""Rows of metrics say what was measured, the same bytes for the same numbers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.results.metrics import Reporting
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import RunFiles
from edge_sdk.errors import PeerGone
from edge_sdk.protocol.messages import EvalReport, Stamp, StepReport
from edge_sdk.runtime.interface import TailSums


class Traffic:
    """A gateway of which only the counters matter."""

    def devices(self) -> list[str]:
        """Who is connected."""
        return ["a"]

    def stats(self, device: str) -> Any:
        """Bytes of a session."""
        if device == "gone":
            raise PeerGone(device)
        return SimpleNamespace(
            session="1", bytes_up=10, bytes_down=20, telemetry={}, traffic={"parts_down": 7}
        )


GATEWAY: Any = Traffic()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Where rows are written."""
    return RunFolder.create(tmp_path, "run")


@pytest.fixture
def reporting(folder: RunFolder) -> Reporting:
    """Reports of a language model's run."""
    return Reporting(RunFiles(folder), is_classifier=False, gateway=GATEWAY)


def step(loss: float, targets: int) -> StepReport:
    """A device's step."""
    return StepReport(
        stamp=Stamp(),
        loss=loss,
        num_targets=targets,
        num_sequences=2,
        num_tokens=2 * targets,
        compute_s=0.5,
        wait_s=0.25,
        peak_bytes=100 * targets,
    )


def evaluation(loss_sum: float, targets: int, correct: int = 0) -> EvalReport:
    """A device's evaluation."""
    return EvalReport(stamp=Stamp(), loss_sum=loss_sum, num_targets=targets, num_correct=correct)


def test_losses_are_means_over_targets(reporting: Reporting, folder: RunFolder) -> None:
    """Every target counts once, whatever the size of its step and its device."""
    for name, loss, targets in (("b", 3.0, 10), ("a", 1.0, 30), ("a", 2.0, 10)):
        reporting.step(name, step(loss, targets), 20)
    reporting.end_round(1, 20, {"samples": 6}, TailSums(8.0, 4, 1))
    reporting.flush()

    (row,) = folder.rows("metrics.jsonl")
    assert row["train_loss"] == pytest.approx((30 + 30 + 20) / 50)
    assert row["train_loss_by_device"] == {"a": 50 / 40, "b": 3.0}
    assert row["eval"] == {
        "loss": 2.0,
        "targets": 4,
        "accuracy": 0.25,
        "perplexity": pytest.approx(math.exp(2.0)),
    }
    assert (row["round"], row["step"], row["samples"]) == (1, 20, 6)


def test_a_row_waits_for_evaluations_in_any_order(reporting: Reporting, folder: RunFolder) -> None:
    """The row is the same bytes whoever evaluates first; who has no data is left out."""
    lines = []
    for order in ("ab", "ba"):
        reporting.end_round(0, 0, {}, None)
        for name in order:
            reporting.evaluation(name, evaluation(2.0 if name == "a" else 6.0, 2))
        reporting.evaluation("c", evaluation(0.0, 0))
        reporting.end_round(1, 20, {}, None)
        lines.append((folder.path / "metrics.jsonl").read_bytes())
        reporting.pending = None
        (folder.path / "metrics.jsonl").unlink()

    assert lines[0] == lines[1]
    assert b'"a": {"accuracy": 0.0, "loss": 1.0' in lines[0]
    assert b'"c"' not in lines[0]


def test_a_row_does_not_wait_for_devices_without_validation_data(
    reporting: Reporting, folder: RunFolder
) -> None:
    """They have reported, too: the row is complete, and its time is that of the round."""
    reporting.end_round(0, 0, {}, TailSums(8.0, 4, 1))
    reporting.evaluation("a", evaluation(0.0, 0))
    reporting.flush_if_complete(["a", "b"])
    assert reporting.pending is not None

    reporting.evaluation("b", evaluation(2.0, 2))
    reporting.flush_if_complete(["a", "b"])

    assert reporting.pending is None
    (row,) = folder.rows("metrics.jsonl")
    assert row["eval_by_device"].keys() == {"b"}


def test_an_overflowing_loss_is_still_a_number(reporting: Reporting, folder: RunFolder) -> None:
    """A run that has diverged writes a huge perplexity, not a traceback."""
    reporting.end_round(1, 20, {}, TailSums(1e9, 1, 0))
    reporting.flush()

    (row,) = folder.rows("metrics.jsonl")
    assert row["eval"]["perplexity"] == math.exp(700.0)


def test_a_classifier_has_no_perplexity(folder: RunFolder) -> None:
    """Accuracy is what counts there."""
    reporting = Reporting(RunFiles(folder), is_classifier=True)
    reporting.end_round(1, 20, {}, TailSums(2.0, 4, 3))
    reporting.flush()

    (row,) = folder.rows("metrics.jsonl")
    assert row["eval"] == {"loss": 0.5, "targets": 4, "accuracy": 0.75}


def test_telemetry_holds_what_the_seed_does_not_decide(
    reporting: Reporting, folder: RunFolder
) -> None:
    """Times, bytes and memory by device; a device that has left has no bytes."""
    reporting.begin_round()
    for name in ("gone", "a", "a"):
        reporting.step(name, step(1.0, 5), 20)
    reporting.telemetry(0)

    (row,) = folder.rows("telemetry.jsonl")
    assert row["devices"]["a"] == {
        "tokens": 20,
        "compute_s": 1.0,
        "wait_s": 0.5,
        "peak_bytes": 500,
        "bytes_up": 10,
        "bytes_down": 20,
        "traffic": {"parts_down": 7},
    }
    assert "bytes_up" not in row["devices"]["gone"]


def test_progress_survives_a_restart(reporting: Reporting) -> None:
    """Steps before a checkpoint still count after it."""
    reporting.step("a", step(1.0, 5), 20)
    saved = reporting.progress()
    reporting.step("a", step(9.0, 5), 20)

    reporting.load_progress(saved)
    reporting.step("a", step(3.0, 5), 20)
    reporting.end_round(1, 20, {}, None)

    assert reporting.pending is not None
    assert reporting.pending["train_loss"] == 2.0
