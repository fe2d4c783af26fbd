"""A device without memory gets less to do, wherever it notices, and the run goes on."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import DevicesCutOff, RoundStarted
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.checkpoints import LocalState
from edge_sdk.client.setup import RuntimeSetup
from edge_sdk.client.steps import Steps
from edge_sdk.data.batches import Batches
from edge_sdk.errors import OutOfMemory
from edge_sdk.protocol.messages import StepReport
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.transport.io_thread import DeviceIo
from tests.e2e.cluster import (
    PATIENCE_S,
    Cluster,
    Serving,
    Trap,
    held_out,
    sentences,
    wait_all,
    write_rows,
)
from tests.e2e.programs import Program, write_yaml

DEFAULT = DeviceSettings(split=2, batch_size=4, codec="float32")
TEGRA = 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":838'


class Short(Callback):
    """Runs out of memory after the first step of each plan that does not fit."""

    def __init__(self, fits: Callable[[Plan], bool]) -> None:
        self.plans: list[Plan] = []
        self._fits = fits

    def on_plan(self, plan: Plan) -> None:
        """Keep it."""
        self.plans.append(plan)

    def on_step_end(self, report: StepReport) -> None:
        """Say what torch says on a Jetson."""
        if report.stamp.step >= 1 and not self._fits(self.plans[-1]):
            raise RuntimeError(TEGRA)


def serve(cluster: Cluster, **settings: Any) -> Serving:
    """Start a coordinator with fixed settings."""
    return cluster.serve(cluster.config(**{"default": DEFAULT, **settings})).start()


def dense(serving: Serving) -> dict[str, np.ndarray]:
    """What the run has learned, by weight."""
    return {name: factors.dense() for name, factors in serving.ledger.totals.items()}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (RuntimeSetup, "files"),
        (RuntimeSetup, "data"),
        (RuntimeSetup, "tensors"),
        (RuntimeSetup, "runtime"),
        (Batches, "at"),
        (TorchRuntime, "forward"),
        (TorchRuntime, "backward"),
        (TorchRuntime, "step"),
        (Steps, "evaluate"),
        (LocalState, "save"),
        (LocalState, "save_moments"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_memory_may_end_anywhere(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """In a thread of the device, while it reads, builds, computes or saves: it gets less to do."""
    real, times = getattr(owner, name), iter([True])

    def once(*arguments: Any, **named: Any) -> Any:
        if next(times, False):
            raise MemoryError
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, once)
    adam = TrainingConfig(learning_rate=1e-3, optimizer="adamw")
    evaluation = EvaluationConfig(on_devices=True)
    serving = serve(cluster, min_devices=1, training=adam, evaluation=evaluation)
    told = Short(lambda _: True)
    client = cluster.client("a", sentences(1), told, data=held_out()).start()

    assert serving.wait() == "completed"

    wait_all([client])
    assert told.plans[-1].micro_batch == 2
    assert "a ran out of memory: micro-batch 4 -> 2" in serving.trap.notes


def test_smaller_micro_batches_change_no_result(cluster: Cluster) -> None:
    """With fixed settings a device that runs out of memory learns what it would have learned."""
    straight = serve(cluster, name="straight")
    wait_all(cluster.start(state=cluster.folder / "straight"))
    assert straight.wait() == "completed"

    serving = serve(cluster, name="short")
    told = Short(lambda plan: plan.micro_batch == 1)
    short = cluster.client("a", sentences(ord("a")), told).start()
    others = cluster.start("b", "c")
    assert serving.wait() == "completed"

    wait_all([short, *others])
    assert [plan.micro_batch for plan in told.plans] == [4, 2, 1]
    assert {plan.batch_size for plan in told.plans} == {4}
    expected, found = dense(straight), dense(serving)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0.0, atol=1e-5 * np.abs(value).max())
    samples = [[row["samples"] for row in own.rows[1:]] for own in (straight, serving)]
    assert samples[0] == samples[1]


def test_fixed_blocks_move_to_the_coordinator(cluster: Cluster) -> None:
    """Where smaller micro-batches do not help, blocks and ranks are given up, one by one."""
    serving = serve(cluster)
    told = Short(lambda plan: plan.is_forward_only)
    short = cluster.client("a", sentences(ord("a")), told).start()
    others = cluster.start("b", "c")

    assert serving.wait(120.0) == "completed"

    wait_all([short, *others])
    assert [(p.micro_batch, p.split, max(p.ranks.values())) for p in told.plans] == [
        (4, 2, 4),
        (2, 2, 4),
        (1, 2, 4),
        (1, 1, 4),
        (1, 1, 2),
        (1, 1, 1),
        (1, 1, 0),
    ]
    assert serving.coordinator.learned.engine.first == 1
    assert serving.ledger.pairs["a"] == {}
    assert serving.rows[-1]["samples"] == 3 * 3 * 4
    rows = serving.folder.rows("plans.jsonl")
    assert rows[-1]["plans"]["a"]["split"] == 1
    assert rows[-1]["plans"]["b"]["split"] == 2
    assert rows[-1]["reasons"] == ["a ran out of memory: computes forward only"]


def test_who_cannot_hold_the_smallest_plan_leaves_with_one_line(
    cluster: Cluster, tmp_path: Path
) -> None:
    """It ends with 6; the run goes on with the others, and takes it back when it returns."""
    serving = serve(cluster, min_devices=2, rounds=50)
    others = cluster.start("b", "c")
    short = cluster.client("a", sentences(1), Short(lambda _: False)).start()

    with pytest.raises(OutOfMemory, match="under the smallest plan .*: 1 blocks, .* of 1") as end:
        short.wait(120.0)

    assert end.value.exit_code == 6
    assert "\n" not in str(end.value)
    told = Short(lambda _: True)
    back = cluster.client("a", sentences(1), told, state=tmp_path / "other").start()
    serving.trap.on_step = lambda device, _: serving.coordinator.stop() if device == "a" else None
    assert serving.wait(120.0) == "paused"
    assert told.plans[0].is_forward_only
    for client in (back, *others):
        client.stop()
    wait_all([back, *others])


def test_who_keeps_missing_rounds_gets_a_smaller_plan(cluster: Cluster) -> None:
    """Between two rounds, with a line that says why; no sample is lost, the others keep theirs."""
    serving = serve(cluster, rounds=5, evaluation=EvaluationConfig(on_devices=False))
    plans: dict[str, list[Plan]] = {name: [] for name in "abc"}
    clients = []
    for name, own in plans.items():
        told = Callback()
        told.on_plan = own.append  # type: ignore[method-assign]
        clients.append(cluster.client(name, sentences(ord(name)), told).start())
    serving.trap.on_row = lambda row: (
        serving.planner.missed("a") if row["round"] in (1, 3) else None
    )

    assert serving.wait() == "completed"

    wait_all(clients)
    assert [[plan.micro_batch for plan in plans[name]] for name in "abc"] == [[4, 2], [4], [4]]
    line = "a missed 2 of the last 3 rounds: micro-batch 4 -> 2"
    assert line in serving.trap.notes
    rows = [row for row in serving.folder.rows("plans.jsonl") if row["reasons"] == [line]]
    assert [row["round"] for row in rows] == [3]
    assert [row["samples"] for row in serving.rows[1:]] == [3 * 3 * 4] * 5


class Slow(Callback):
    """Stands still in each round until it is cut off, under any plan but a smaller one."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.gate, self.is_quick = threading.Semaphore(0), threading.Event()

    def on_plan(self, plan: Plan) -> None:
        """Keep it."""
        self.plans.append(plan)

    def on_step_end(self, _: StepReport) -> None:
        """Wait for the end of the round, or be quick."""
        if self.plans[-1].micro_batch < 4:
            self.is_quick.set()
        else:
            self.gate.acquire(timeout=PATIENCE_S)


class Gatekeeper(Trap):
    """Lets the slow device go on once the round goes on without it."""

    def __init__(self, slow: Slow) -> None:
        super().__init__()
        self._slow, self.has_begun = slow, threading.Event()

    def see(self, event: RunEvent) -> None:
        """Open its gate."""
        super().see(event)
        if isinstance(event, DevicesCutOff) and "b" in event.devices:
            self._slow.gate.release()
        elif isinstance(event, RoundStarted):
            self.has_begun.set()


def test_who_is_too_slow_for_every_deadline_gets_a_smaller_plan(cluster: Cluster) -> None:
    """Cut off in two rounds, it trains the next ones with less; the run waits for neither."""
    slow = Slow()
    config = cluster.config(default=DEFAULT, min_devices=2, rounds=100_000, round_deadline_s=2.0)
    trap = Gatekeeper(slow)
    serving = cluster.serve(config, trap=trap).start()
    others = cluster.start("a", "c")
    assert trap.has_begun.wait(PATIENCE_S)  # enough are left when it is cut off
    client = cluster.client("b", sentences(2), slow).start()

    assert slow.is_quick.wait(3 * PATIENCE_S), serving.trap.notes

    serving.coordinator.stop()
    assert serving.wait() == "paused"
    assert [plan.micro_batch for plan in slow.plans][:2] == [4, 2]
    assert any(
        re.fullmatch(r"b missed 2 of the last [23] rounds: micro-batch 4 -> 2", note)
        for note in serving.trap.notes
    )
    for one in (client, *others):
        one.stop()
    wait_all([client, *others])


def test_want_of_memory_that_cost_the_link_is_told_by_the_next_start(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of the link met it: this program ends with 6, the next one gets less to do."""
    turn, is_short = DeviceIo._turn, threading.Event()

    def short_turn(self: DeviceIo) -> None:
        if is_short.is_set():
            is_short.clear()
            raise MemoryError
        turn(self)

    monkeypatch.setattr(DeviceIo, "_turn", short_turn)
    serving = serve(cluster, min_devices=1)
    told = Callback()
    told.on_step_end = lambda _: is_short.set()  # type: ignore[method-assign]
    first = cluster.client("a", sentences(1), told).start()

    with pytest.raises(OutOfMemory):
        first.wait(60.0)

    again = Short(lambda _: True)
    second = cluster.client("a", sentences(1), again).start()
    assert serving.wait(60.0) == "completed"
    wait_all([second])
    assert [plan.micro_batch for plan in again.plans] == [2]


NO_MEMORY = """
import sys
from edge_sdk.cli import main
from edge_sdk.runtime.torch_runtime import TorchRuntime


def forward(*_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


TorchRuntime.forward = forward
sys.exit(main(["run", *sys.argv[1:]]))
"""


def test_a_program_without_memory_for_any_plan_ends_with_6(cluster: Cluster) -> None:
    """One line, no traceback; `edge-sdk run` itself."""
    serving = serve(cluster, min_devices=1)
    script = cluster.folder / "run.py"
    script.write_text(NO_MEMORY)
    settings = {
        "coordinator": cluster.address,
        "server_key": cluster.public,
        "secret_key": "a.key",
        "data": {"path": str(write_rows(cluster.folder / "a.jsonl", sentences(1)))},
        "cache": str(cluster.parts),
        "device": "cpu",
    }
    config = write_yaml(cluster.folder / "a.yaml", settings)

    device = Program("python", str(script), "--config", str(config), cwd=cluster.folder)

    assert device.wait() == OutOfMemory.exit_code == 6
    *_, last = [line for line in device.lines if line.startswith("edge-sdk:")]
    assert "out of memory under the smallest plan" in last
    assert "Traceback" not in device.text
    plans = [line for line in device.lines if line.startswith("plan:")]
    assert len(plans) == 7
    serving.coordinator.stop()
    assert serving.wait() == "paused"
