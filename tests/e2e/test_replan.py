"""Plans made for real devices, and changed while the run goes on, without losing anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.engine.local import LocalEngine
from coordinator.planning.costs import options
from edge_sdk.client.board_monitor import BoardMonitor
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.speed_drift import SpeedDrift
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import EdgeError
from edge_sdk.protocol.messages import StepReport
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.training import TrainingConfig
from profiler.profile import DeviceProfile
from tests.e2e.cluster import Cluster, Serving, held_out, sentences, wait_all, write_rows

MIB = float(2**20)
LONG_S = 120.0  # every change of plan builds the slices anew
LINK = {"up_bytes_per_s": 1e6, "down_bytes_per_s": 4e6, "round_trip_s": 0.01}
SMALL = DeviceProfile(memory_bytes=20 * MIB, overhead_bytes=0.0, flops_per_s=1e9, **LINK)
PROFILES = {
    "a": SMALL,
    "b": replace(SMALL, memory_bytes=24 * MIB, flops_per_s=2e9),
    "c": replace(SMALL, memory_bytes=256 * MIB, flops_per_s=8e9),
}
PLANNING = PlanningConfig(
    split="armsc",
    ranks="rngwp",
    rank_set=(2, 4, 8),
    server_memory_bytes=512 * MIB,
    server_flops_per_s=4e9,
    importance_every=2,
)
RESTLESS = replace(PLANNING, drift=0.0, min_gain=0.0, adapter_bytes=150_000.0)


class Progress(Callback):
    """Keeps the plans that a device was given.

    Args:
        fails_at: Step after which the device runs out of memory.
        fits: Which plans it can hold for all that.
    """

    def __init__(
        self, fails_at: int = -1, fits: Callable[[Plan, Plan], bool] = lambda _first, _now: False
    ) -> None:
        self.plans: list[Plan] = []
        self.fails_at, self.fits = fails_at, fits

    def on_plan(self, plan: Plan) -> None:
        """Keep it."""
        self.plans.append(plan)

    def on_step_end(self, report: StepReport) -> None:
        """Run out of memory until the plan fits."""
        is_too_much = not self.fits(self.plans[0], self.plans[-1])
        if report.stamp.step == self.fails_at and is_too_much:
            raise MemoryError("no room for another tensor")


def is_smaller(first: Plan, now: Plan) -> bool:
    """Whether a plan has fewer ranks or blocks than the first one."""
    return sum(now.ranks.values()) < sum(first.ranks.values()) or now.split < first.split


def serve(cluster: Cluster, planning: PlanningConfig, **settings: Any) -> Serving:
    """Start a coordinator that plans and evaluates."""
    shard = write_rows(cluster.folder / "dev.jsonl", sentences(9, 8))
    settings = {
        "rounds": 4,
        "steps_per_round": 4,
        "max_length": 40,
        "training": TrainingConfig(learning_rate=1e-2, lr_scheduler_type="constant"),
        "evaluation": EvaluationConfig(data=DataConfig(path=str(shard))),
        "planning": planning,
        **settings,
    }
    return cluster.serve(cluster.config(**settings)).start()


def take_part(
    cluster: Cluster, told: dict[str, Progress], name: str = "run", more_bytes: float = 0.0
) -> list[Any]:
    """Start all three devices, each with *more_bytes* beyond its profile."""
    profiles = {
        n: replace(p, memory_bytes=(p.memory_bytes or 0.0) + more_bytes)
        for n, p in PROFILES.items()
    }
    return [
        cluster.client(
            n,
            sentences(ord(n)),
            told[n],
            profile=profiles[n],
            data=held_out(),
            state=cluster.folder / f"state-{name}",
        ).start()
        for n in "abc"
    ]


def check_global(serving: Serving) -> None:
    """What the coordinator evaluates is dW, own adapter and residual together."""
    engine = serving.coordinator.learned.engine
    assert isinstance(engine, LocalEngine)
    for weight, total in serving.ledger.totals.items():
        own = engine.trained.adapters.products().get(weight)
        held = [
            f.dense() for f in (own, engine.trained.adapters.residual.get(weight)) if f is not None
        ]
        error = np.linalg.norm(sum(held) - total.dense())
        assert error <= 3e-5 * max(1e-3, float(np.linalg.norm(total.dense()))), weight


@pytest.mark.parametrize("aggregation", ["exact", "stack", "svd"])
def test_plans_change_in_the_middle_of_a_run(cluster: Cluster, aggregation: str) -> None:
    """Ranks follow importance between rounds; the run learns, and everybody still holds dW."""
    told = {n: Progress() for n in "abc"}
    serving = serve(cluster, RESTLESS, aggregation=aggregation)
    clients = take_part(cluster, told)

    assert serving.wait(LONG_S) == "completed"

    wait_all(clients, LONG_S)
    rows = serving.folder.rows("plans.jsonl")
    assert rows[0]["reasons"] == ["first plans"]
    assert len(rows) >= 2
    assert any("importance" in reason for reason in rows[1]["reasons"])
    assert any(len(own.plans) >= 2 for own in told.values())
    depth = {n: own.plans[0].split for n, own in told.items()}
    assert depth["a"] <= depth["b"] <= depth["c"]
    losses = [row["eval"]["loss"] for row in serving.rows]
    assert losses[-1] < 0.97 * losses[0]
    if aggregation != "svd":
        check_global(serving)


def test_a_device_out_of_memory_gets_a_smaller_plan(cluster: Cluster) -> None:
    """The device reports it, comes back to a plan that takes less, and the run completes."""
    told = {n: Progress(fails_at=5 if n == "c" else -1, fits=is_smaller) for n in "abc"}
    default = DeviceSettings(split=2, batch_size=24, codec="float32")
    serving = serve(cluster, PLANNING, default=default, patience_s=20.0)
    clients = take_part(cluster, told, more_bytes=20 * MIB)

    assert serving.wait(4 * LONG_S) == "completed"  # one plan after the other

    wait_all(clients, LONG_S)
    first, *_, last = told["c"].plans
    assert sum(last.ranks.values()) < sum(first.ranks.values()) or last.split < first.split
    assert any("OutOfMemory" in note for note in serving.trap.notes)
    assert told["c"].plans[1] == replace(first, micro_batch=12)
    assert "c ran out of memory: micro-batch 24 -> 12" in serving.trap.notes
    reasons = [reason for row in serving.folder.rows("plans.jsonl") for reason in row["reasons"]]
    assert "c ran out of memory: micro-batch 24 -> 12" in reasons


def test_a_device_out_of_memory_for_training_computes_forward_only(cluster: Cluster) -> None:
    """It had just room to train one block; afterwards it goes on with that block frozen."""
    is_frozen = lambda _, plan: plan.is_forward_only  # noqa: E731
    told = {n: Progress(fails_at=5 if n == "c" else -1, fits=is_frozen) for n in "abc"}
    default = DeviceSettings(split=2, batch_size=24, micro_batch=6, codec="float32")
    planning = replace(PLANNING, rank_set=(2,))
    serving = serve(cluster, planning, default=default, patience_s=20.0)
    start = serving.model.planning_problem()
    assert start is not None
    known = replace(start, profiles={"c": PROFILES["c"]})
    needed = min(option.device_bytes for option in options(known, "c"))
    just = replace(PROFILES["c"], memory_bytes=1.001 * needed / (1.0 - planning.memory_margin))
    profiles = {n: replace(PROFILES["c"], memory_bytes=64 * MIB) for n in "ab"} | {"c": just}
    clients = [
        cluster.client(n, sentences(ord(n)), told[n], profile=profiles[n]).start() for n in "abc"
    ]

    assert serving.wait(4 * LONG_S) == "completed"  # one plan after the other

    wait_all(clients, LONG_S)
    first, *_, last = told["c"].plans
    assert (first.split, first.is_forward_only) == (1, False)
    assert (last.split, last.is_forward_only) == (1, True)
    assert serving.ledger.pairs["c"] == {}
    losses = [row["eval"]["loss"] for row in serving.rows]
    assert losses[-1] < 0.97 * losses[0]
    check_global(serving)


def test_a_board_that_has_changed_is_measured_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a throttled or re-clocked board's round the coordinator plans with a new speed."""
    changed = iter([False] * 5 + [True])  # after the second step of the second round
    monkeypatch.setattr(BoardMonitor, "take_change", lambda _: next(changed, False))
    by_hand = replace(PROFILES["c"], flops_per_s=None)
    serving = serve(cluster, PLANNING, min_devices=1)
    planner, told = serving.planner, list[DeviceProfile]()
    profiled = planner.profiled

    def spy(device: str, profile: DeviceProfile) -> None:
        told.append(profile)
        profiled(device, profile)

    planner.profiled = spy  # type: ignore[method-assign]
    client = cluster.client("a", sentences(1), profile=by_hand).start()

    assert serving.wait(LONG_S) == "completed"

    wait_all([client], LONG_S)
    first, *later = told
    assert first.flops_per_s is not None
    assert later
    assert later[0].flops_per_s not in (None, first.flops_per_s)
    assert replace(later[0], flops_per_s=first.flops_per_s) == first


def test_a_link_may_be_measured_after_every_round(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rounds there are, nobody is taken for one who probes without end."""
    monkeypatch.setattr(SpeedDrift, "end_round", lambda _: (None, True))
    unknown = dict.fromkeys(("up_bytes_per_s", "down_bytes_per_s", "round_trip_s"))
    by_hand = replace(PROFILES["c"], **unknown)
    serving = serve(cluster, PLANNING, min_devices=1, rounds=6, steps_per_round=1)
    client = cluster.client("a", sentences(1), profile=by_hand).start()

    assert serving.wait(LONG_S) == "completed"

    wait_all([client], LONG_S)
    assert serving.trap.notes.count("a: another speed") == 6


def test_a_planned_run_resumes_bit_for_bit(cluster: Cluster) -> None:
    """Stopped and resumed between changes of plan, the metrics are those of an unbroken run."""
    straight = serve(cluster, RESTLESS, name="straight")
    wait_all_after(straight, take_part(cluster, {n: Progress() for n in "abc"}, "straight"))

    stopped = serve(cluster, RESTLESS, name="stopped").stop_at(6)
    clients = take_part(cluster, {n: Progress() for n in "abc"}, "stopped")
    assert stopped.wait(LONG_S) == "paused"
    resumed = serve(cluster, RESTLESS, name="stopped")
    wait_all_after(resumed, clients)

    assert resumed.metrics == straight.metrics


def wait_all_after(serving: Serving, clients: list[Any]) -> None:
    """Wait for the coordinator, then for its devices."""
    assert serving.wait(LONG_S) == "completed"
    wait_all(clients, LONG_S)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"memory_bytes": float("nan")}, "a finite number - at `Profiled.profile.memory_bytes`"),
        ({"flops_per_s": -1.0}, "flops_per_s is -1.0"),
        ({"memory_bytes": 100 * MIB, "total_memory_bytes": 10 * MIB}, "10.0 x the device's"),
        ({"memory_bytes": 1000.0}, "memory|block"),
    ],
)
def test_a_nonsense_profile_is_refused(
    cluster: Cluster, change: dict[str, float], text: str
) -> None:
    """One clear line; the run goes on with the devices that make sense."""
    serving = serve(cluster, PLANNING, min_devices=2)
    told = {n: Progress() for n in "abc"}
    bad = cluster.client("c", sentences(3), profile=replace(PROFILES["c"], **change)).start()

    with pytest.raises(EdgeError, match=text):
        assert bad.wait(60.0)
    clients = [
        cluster.client(n, sentences(ord(n)), told[n], profile=PROFILES[n]).start() for n in "ab"
    ]
    assert serving.wait(LONG_S) == "completed"
    wait_all(clients, LONG_S)
