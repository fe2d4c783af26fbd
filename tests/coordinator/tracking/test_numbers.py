"""What happens in a run, in numbers: right names, right steps, sums that a new session keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.run import ServeConfig
from coordinator.results.events.devices import DeviceJoined, DeviceLeft, DeviceStatus
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import (
    DevicesMissing,
    RoundDone,
    RoundStarted,
    StepDone,
    Telemetry,
    UploadRefused,
    Waiting,
    WaitingOver,
)
from coordinator.results.events.steering import TestEvaluated
from coordinator.results.history import RunHistory
from coordinator.results.run_folder import RunFolder
from coordinator.tracking.names import DEVICE_NUMBERS, RUN_NUMBERS, Moment
from coordinator.tracking.numbers import Numbers, so_far
from edge_sdk.protocol.messages import Stamp, StepReport
from edge_sdk.runtime.training import TrainingConfig, learning_rate

BOARD = {
    "temperature": 61.0,
    "power": 7.5,
    "energy": 300.0,
    "memory_total": 8e9,
    "memory_available": 5e9,
    "something_else": 1.0,
}


def config_of(**settings: Any) -> ServeConfig:
    """A run of two rounds of two steps."""
    return ServeConfig(model="m", rounds=2, steps_per_round=2, **settings)


def step(number: int, device: str = "a", up: int = 0, board: Any = None) -> StepDone:
    """A device has done a step of 50 tokens in half a second."""
    report = StepReport(
        stamp=Stamp(run="r", device=device, step=number),
        loss=2.0 + number,
        num_targets=40,
        num_sequences=4,
        num_tokens=50,
        compute_s=0.3,
        wait_s=0.2,
        peak_bytes=1000,
    )
    return StepDone(device, report, number - number % 2 + 2, (up, 2 * up), board or {})


def told(samples: list[Moment]) -> dict[Any, float]:
    """Numbers by name, and by device where they are one's."""
    found = {}
    for sample in samples:
        for name, value, device in sample.numbers:
            found[name if device is None else (device, name)] = value
    return found


def test_every_step_is_a_point_and_a_rounds_last_one_tells_the_rest() -> None:
    """Loss and rate are points of every step; what changes slowly is one at the end of a round."""
    numbers = Numbers(config_of())

    first, last = numbers.of(step(0, board=BOARD)), numbers.of(step(1, board=BOARD))

    assert [(s.step, len(s.numbers)) for s in first if not s.is_live] == [(1, 2)]
    assert [s.step for s in last if not s.is_live] == [2, 2]
    found = told(last)
    assert found["a", "train/loss"] == 3.0
    assert found["a", "train/tokens_per_second"] == 100.0
    assert found["a", "board/temperature_celsius"] == 61.0
    assert found["a", "board/memory_used_bytes"] == 3e9
    assert found["train/global_step"] == 2


def test_a_row_of_metrics_has_the_names_of_trainer() -> None:
    """train/loss, eval/loss, eval/perplexity, train/learning_rate; by device what is a device's."""
    training = TrainingConfig(learning_rate=0.5)
    numbers = Numbers(config_of(training=training))
    costs = {"a": {"tokens": 100, "bytes_up": 7, "bytes_down": 9}}
    score = {"loss": 1.5, "accuracy": 0.25, "perplexity": 4.48, "targets": 8}

    numbers.of(Telemetry(0, 12.5, costs))
    row = {"round": 1, "step": 2, "train_loss": 2.5, "samples": 16, "rank": 4}
    found = told(numbers.of(RoundDone({**row, "eval": score, "eval_by_device": {"a": score}}, {})))

    assert found["train/loss"] == 2.5
    assert found["train/learning_rate"] == learning_rate(training, 1, 4)
    assert (found["eval/loss"], found["eval/perplexity"]) == (1.5, 4.48)
    assert found["a", "eval/accuracy"] == 0.25
    assert (found["train/num_input_tokens_seen"], found["train/samples"]) == (100, 16)
    assert (found["round/seconds"], found["round/devices"]) == (12.5, 1)
    assert (found["traffic/up_bytes"], found["traffic/down_bytes"]) == (7, 9)


def test_scores_of_devices_alone_are_joined() -> None:
    """Without a file of the coordinator eval/loss is that of all devices' targets alike."""
    scores = {n: {"loss": x, "accuracy": 0.5, "targets": 10} for n, x in (("a", 1.0), ("b", 3.0))}

    found = told(
        Numbers(config_of()).of(RoundDone({"round": 0, "step": 0, "eval_by_device": scores}, {}))
    )

    assert found["eval/loss"] == 2.0
    assert found["eval/perplexity"] == pytest.approx(7.389, rel=1e-3)


def test_bytes_go_on_over_sessions_and_restarts(tmp_path: Path) -> None:
    """Events say what the run has moved, and so do trackers, also before a device is back."""
    numbers = Numbers(config_of())
    for number, up in ((0, 10), (1, 30), (2, 35)):
        found = told(numbers.of(step(number, up=up)))
    folder = RunFolder(tmp_path)
    cost = {"tokens": 50, "compute_s": 1.0, "wait_s": 0.0, "peak_bytes": 1}
    row = {"round": 0, "seconds": 1.0, "devices": {"a": {**cost, "bytes_up": 40, "bytes_down": 2}}}
    folder.append("telemetry.jsonl", row)
    folder.append("metrics.jsonl", {"round": 0, "step": 0})

    later = Numbers(config_of())
    later.of(so_far(RunHistory(folder)))
    before = told(later.of(RoundDone({"round": 1, "step": 2}, {})))
    after = told(later.of(step(2, up=41)))

    assert found["a", "traffic/up_bytes"] == 35
    assert after["a", "traffic/up_bytes"] == 41
    assert before["traffic/up_bytes"] == 40
    assert before["train/num_input_tokens_seen"] == 50
    assert before["round/seconds"] == 1.0


TROUBLE: list[RunEvent] = [
    DeviceLeft("a", "silent for 30 s"),
    DeviceStatus("a", "out of memory", is_delay=True),
    UploadRefused(0, "a", "not finite"),
]


def test_trouble_and_waiting_are_counted() -> None:
    """Losses, delays and refusals by device; how many keep the run waiting; no trouble by will."""
    numbers = Numbers(config_of())

    for event in TROUBLE:
        found = told(numbers.of(event))
    waits = [
        told(numbers.of(event))["run/waiting"]
        for event in (
            Waiting("step 3", ["a", "b"], 15.0, None),
            WaitingOver("step 3", "a", 20.0),
            RoundStarted(1, 1, ["a", "b"], {}),
            DevicesMissing(2, ["a"], 3, {}, 9.0),
        )
    ]

    assert found == {("a", "run/troubles"): 3}
    assert waits == [2, 1, 0, 2]
    assert numbers.of(DeviceLeft("a", "completed")) == []
    assert told(numbers.of(DeviceJoined("b", 3, 20))) == {("b", "plan/blocks"): 3}


def test_every_number_has_a_meaning() -> None:
    """Whatever is told stands in the tables that trackers and docs read."""
    numbers = Numbers(config_of())
    row = {"round": 1, "step": 2, "train_loss": 1.0, "rank": 2, "lag": 0.1, "samples": 3}
    score = {"loss": 1.5, "accuracy": 0.25, "perplexity": 4.48, "targets": 8}
    events = [
        *TROUBLE,
        step(1, board=BOARD),
        DeviceJoined("a", 2, 9),
        RoundStarted(0, 1, ["a"], {}),
        RoundDone({**row, "eval": score, "eval_by_device": {"a": score}}, {}),
        TestEvaluated(1, score),
    ]

    found = told([sample for event in events for sample in numbers.of(event)])

    assert {name for name in found if isinstance(name, str)} <= RUN_NUMBERS.keys()
    assert found["test/loss"] == 1.5
    assert {name[1] for name in found if isinstance(name, tuple)} <= DEVICE_NUMBERS.keys()


@pytest.mark.parametrize(
    ("numbers", "after"), [(RUN_NUMBERS, "Run numbers"), (DEVICE_NUMBERS, "Device numbers")]
)
def test_the_page_lists_every_number(numbers: Any, after: str) -> None:
    """docs/monitoring.md names them all, and no other."""
    page = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text("utf-8")
    _, _, rest = page.partition(f"<!-- {after} -->\n")
    table, _, _ = rest.partition("\n\n")

    named = [name for row in table.splitlines()[2:] for name in row.split("|")[1].split("`")[1::2]]

    assert sorted(named) == sorted(numbers)


def test_a_number_that_is_none_stays_one() -> None:
    """A loss that was no number is told as NaN, and nothing breaks on it."""
    row = json.loads('{"round": 1, "step": 2, "eval": {"loss": null, "accuracy": 0, "targets": 1}}')

    found = told(Numbers(config_of()).of(RoundDone(row, {})))

    assert found["eval/loss"] != found["eval/loss"]
    assert found["eval/perplexity"] != found["eval/perplexity"]
