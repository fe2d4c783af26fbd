"""Runs that are paused and stopped from another shell, as processes."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.results.run_folder import RunFolder
from coordinator.steering.wishes import Wish
from tests.e2e.cluster import Cluster, held_out, wait_all
from tests.e2e.programs import Program, Start

RUN = "runs/run"
LONG = ("rounds=5000", "min_devices=2")


def serve(start: Start, *settings: str) -> tuple[Program, list[Program]]:
    """Begin a run with its devices."""
    coordinator = start("coordinator", "serve", "--config", "run.yaml", *settings)
    coordinator.wait_for("listening at")
    return coordinator, [start("edge-sdk", "run", "--config", f"{name}.yaml") for name in "ab"]


def run_folder(files: Cluster) -> RunFolder:
    """The folder of the run."""
    return RunFolder(files.folder / RUN)


def state_of(start: Start) -> str:
    """What `coordinator status` says of the run, in its first line."""
    status = start("coordinator", "status", RUN)
    assert status.wait() == 0
    return status.lines[0]


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_a_stopped_run_leaves_what_it_has(cluster: Cluster, mode: Any) -> None:
    """Stopped after the round: that is evaluated by all, and everybody hears of the end."""
    serving = cluster.serve(cluster.config(rounds=5000, round_mode=mode, aggregation="exact"))
    serving.trap.on_row = lambda row: (
        serving.coordinator.ask(Wish("stop", after_round=True)) if row["round"] == 1 else None
    )

    serving.start()
    clients = cluster.start(data=held_out())

    assert serving.wait() == "stopped"
    wait_all(clients)
    assert set(serving.rows[-1]["eval_by_device"]) == {"a", "b", "c"}
    assert serving.state.round == serving.rows[-1]["round"] < 10
    assert serving.events[-1]["outcome"] == "stopped"


def test_a_run_that_waits_can_be_steered(files: Cluster, start: Start) -> None:
    """While it waits for devices a run shows what it was asked for, and is left at once."""
    coordinator = start("coordinator", "serve", "--config", "run.yaml", *LONG)
    coordinator.wait_for("listening at")

    stopped = start("coordinator", "stop", RUN, "--after-round")

    assert [p.wait() for p in (stopped, coordinator)] == [0, 0], stopped.text
    assert "no result yet" in coordinator.text
    assert "stopped at step 0 of 15000, resumable" in stopped.text
    again = start("coordinator", "pause", RUN)
    assert again.wait() == 2
    assert again.lines == [
        f"coordinator: {RUN}: this run does not go on now; see `coordinator status {RUN}`"
    ]
    asked = [r for r in run_folder(files).rows("events.jsonl") if r["event"] == "stop.asked"]
    assert [(row["wish"], row["after_round"]) for row in asked] == [("stop", True)]


def test_a_wish_can_be_changed_while_a_round_goes_on(files: Cluster, start: Start) -> None:
    """A run that is to stop after a round that waits for a frozen device says so, and can pause."""
    coordinator, devices = serve(start, *LONG, "steps_per_round=1000")
    coordinator.wait_for_match("a: ready(.*\n)+.*b: ready|b: ready(.*\n)+.*a: ready")
    devices[1].wait_for("round 1")
    devices[0].freeze()
    first = start("coordinator", "stop", RUN, "--after-round")
    first.wait_for("stopping after this round")
    assert "a stop after this round was asked for" in state_of(start)
    devices[0].thaw()

    paused = start("coordinator", "pause", RUN)

    assert [p.wait() for p in (first, paused, coordinator)] == [0, 0, 130], paused.text
    assert "paused at step" in first.lines[-1]
    assert int(run_folder(files).checkpoints()[-1].name.removeprefix("checkpoint-")) > 0
    resumed = start("coordinator", "resume", RUN)
    resumed.wait_for_match("a: ready(.*\n)+.*b: ready|b: ready(.*\n)+.*a: ready")
    stopped = start("coordinator", "stop", RUN)
    assert [p.wait() for p in (stopped, resumed, *devices)] == [0, 0, 0, 0], stopped.text
    assert "stopped after 0 of 5000 rounds, so there is no result yet" in resumed.text
    assert [p.lines[-1] for p in devices] == ["ended: the run was stopped by its operator"] * 2
    assert "stopped at step" in state_of(start)
