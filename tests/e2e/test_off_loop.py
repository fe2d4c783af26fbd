"""The event loop of a real run answers devices; it neither plans nor saves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from coordinator.planning import run_planner
from coordinator.results.run_folder import RunFolder
from edge_sdk import held_states
from tests.e2e.cluster import PATIENCE_S, Cluster, held_out, sentences, wait_all
from tests.e2e.test_replan import LONG_S, RESTLESS, Progress, is_smaller, serve, take_part

SLOW: list[tuple[Any, str]] = [
    (run_planner, "plan_all"),
    (run_planner, "replan"),
    (run_planner, "plan_less"),
    (run_planner, "pruned_rank"),
    (RunFolder, "save_checkpoint"),
    (RunFolder, "load_checkpoint"),
    (held_states, "_log_commit"),
]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """The threads in which each of `SLOW` was called."""
    found: dict[str, set[int]] = {name: set() for _, name in SLOW}

    def note(owner: Any, name: str) -> None:
        slow = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            found[name].add(threading.get_ident())
            return slow(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in SLOW:
        note(owner, name)
    return found


def test_the_loop_plans_nothing(cluster: Cluster, threads: dict[str, set[int]]) -> None:
    """First plans, less for a device that is short of memory, and new plans between rounds."""
    serving = serve(cluster, RESTLESS)
    told = {"a": Progress(), "b": Progress(), "c": Progress(2, is_smaller)}
    clients = take_part(cluster, told)

    assert serving.wait(LONG_S) == "completed"

    wait_all(clients, LONG_S)
    assert all(threads[name] for name in ("plan_all", "replan", "plan_less"))
    assert all(serving._thread.ident not in own for own in threads.values())


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_the_loop_saves_nothing(cluster: Cluster, threads: dict[str, set[int]], mode: str) -> None:
    """At the start, after rounds, when it stops and when it goes on, in both kinds of rounds."""
    config = cluster.config(round_mode=mode, aggregation="exact")
    serving = cluster.serve(config).stop_at(4).start()
    clients = cluster.start()

    assert serving.wait() == "paused"
    assert threads["save_checkpoint"]
    assert all(serving._thread.ident not in own for own in threads.values())
    resumed = cluster.serve(config)
    for own in threads.values():
        own.clear()
    assert resumed.start().wait() == "completed"

    wait_all(clients)
    assert threads["save_checkpoint"]
    assert all(resumed._thread.ident not in own for own in threads.values())


def test_a_lost_device_lets_another_thread_go_back(
    cluster: Cluster, threads: dict[str, set[int]]
) -> None:
    """The checkpoint to which an abandoned round returns is not read by the loop."""
    serving = cluster.serve().start()
    *others, lost = cluster.start()
    again: list[Any] = []

    def leave(device: str, report: Any) -> None:
        if (device, report.stamp.step) == ("a", 1) and not again:
            again.append(None)
            threading.Thread(target=lost.stop).start()

    serving.trap.on_step = leave
    assert lost.wait(PATIENCE_S)
    again.append(cluster.client("c", sentences(ord("c"))).start())

    assert serving.wait() == "completed"

    wait_all([*others, again[1]])
    assert threads["load_checkpoint"]
    assert all(serving._thread.ident not in own for own in threads.values())


def test_a_slow_disk_delays_no_greeting(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a round is saved slowly, a device that comes is greeted and told its plan."""
    cluster.register("d")
    held, go, save = threading.Event(), threading.Event(), RunFolder.save_checkpoint

    def slow(self: RunFolder, step: int, *about: Any) -> Path:
        if step == 3:
            held.set()
            assert go.wait(PATIENCE_S)
        return save(self, step, *about)

    monkeypatch.setattr(RunFolder, "save_checkpoint", slow)
    serving = cluster.serve().start()
    clients = cluster.start("a", "b", "c")
    assert held.wait(PATIENCE_S)
    joined, seen = threading.Event(), serving.trap.see

    def see(event: Any) -> None:
        seen(event)
        if getattr(event, "device", "") == "d" and type(event).__name__ == "DeviceJoined":
            joined.set()

    monkeypatch.setattr(serving.trap, "see", see)
    clients += [cluster.client("d", sentences(4), data=held_out()).start()]

    assert joined.wait(PATIENCE_S)

    assert not go.is_set()
    go.set()
    assert serving.wait() == "completed"
    wait_all(clients)
