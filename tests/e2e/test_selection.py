"""Rounds of devices that are drawn, over real sockets: whoever leaves or dies, the draws stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.replay import ReplayConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.results.run_folder import RunFolder
from edge_sdk.data.rows import DataConfig
from edge_sdk.deadline import Deadline
from tests.e2e.cluster import (
    Cluster,
    DieAt,
    Died,
    Serving,
    held_out,
    sentences,
    wait_all,
    write_rows,
)
from tests.e2e.programs import PATIENCE_S, Start
from tests.e2e.test_leaving import leaving_at
from tests.e2e.test_replan import PROFILES

NAMES = tuple("abcde")
STEPS, PER_ROUND = 3, 2
DEVICES = {
    "a": DeviceSettings(split=1, r=2),
    "b": DeviceSettings(split=3, batch_size=6, micro_batch=2),
    "c": DeviceSettings(split=4, r=3),
}
IN_MID_ROUND = STEPS + 1
"""A step of the second round that is neither its first nor its last."""


@pytest.fixture
def cluster(tmp_path: Path, llama: Path, parts: Path) -> Iterator[Cluster]:
    """A coordinator and five devices."""
    made = Cluster(tmp_path, llama, parts, NAMES)
    yield made
    made.close()


def config_of(cluster: Cluster, **settings: Any) -> ServeConfig:
    """Three rounds of three steps with AdamW, each of two of five devices."""
    dev = write_rows(cluster.folder / "dev.jsonl", sentences(9, 6))
    chosen = {
        "rounds": 3,
        "steps_per_round": STEPS,
        "devices_per_round": PER_ROUND,
        "devices": DEVICES,
        "training": replace(cluster.config().training, optimizer="adamw"),
        "evaluation": EvaluationConfig(data=DataConfig(path=str(dev))),
        **settings,
    }
    return cluster.config(**chosen)


def complete(cluster: Cluster, config: ServeConfig, **settings: Any) -> Serving:
    """Run from beginning to end, in folders of its own."""
    serving = cluster.serve(config).start()
    state = cluster.folder / f"state-{config.name}"
    clients = cluster.start(data=held_out(), state=state, **settings)
    assert serving.wait() == "completed"
    wait_all(clients)
    return serving


Wholes = Callable[[str], Serving]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: Path) -> Wholes:
    """Undisturbed runs by label mode, each made once."""

    @cache
    def run(labels: str) -> Serving:
        cluster = Cluster(tmp_path_factory.mktemp("whole"), llama, parts, NAMES)
        return complete(cluster, config_of(cluster, labels=labels))

    return run


def drawn(folder: RunFolder) -> list[list[str]]:
    """Who was in each round, by its last attempt."""
    starts = [row for row in folder.rows("events.jsonl") if row["event"] == "round.started"]
    return [row["devices"] for row in {row["round"]: row for row in starts}.values()]


def assert_same(serving: Serving, whole: Serving) -> None:
    """Both have drawn, measured and learned the same, bit for bit."""
    assert drawn(serving.folder) == drawn(whole.folder)
    assert all(len(names) == PER_ROUND for names in drawn(whole.folder))
    assert serving.metrics == whole.metrics
    assert_learned(serving, whole)


def assert_learned(serving: Serving, whole: Serving) -> None:
    """Both have learned the same, bit for bit."""
    found, expected = serving.ledger.state(), whole.ledger.state()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize(("labels", "save_every_s"), [("server", None), ("device", 0.0)])
def test_a_coordinator_that_dies_in_a_round_draws_as_it_would_have(
    cluster: Cluster, wholes: Wholes, labels: Any, save_every_s: float | None
) -> None:
    """Begun again or gone on with, the round has its devices, and so have all that follow."""
    config = config_of(cluster, labels=labels, save_every_s=save_every_s)
    who = drawn(wholes(labels).folder)[1][0]
    killed = cluster.serve(config).crash_at(IN_MID_ROUND, who).start()
    clients = cluster.start(data=held_out())
    assert killed.wait() == "crashed"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    assert_same(resumed, wholes(labels))


@pytest.mark.parametrize("labels", ["server", "device"])
def test_who_leaves_when_it_is_drawn_comes_back_to_its_round(
    cluster: Cluster, wholes: Wholes, labels: Any
) -> None:
    """Ctrl-C on a device of the round: it goes on where it was saved, with the same devices."""
    who = drawn(wholes(labels).folder)[1][0]
    serving = cluster.serve(config_of(cluster, labels=labels)).start()
    staying = cluster.start(*(n for n in NAMES if n != who), data=held_out())

    leaving_at(IN_MID_ROUND, cluster, who, data=held_out()).start().wait()
    back = cluster.start(who, data=held_out())

    assert serving.wait() == "completed"
    wait_all([*staying, *back])
    assert_same(serving, wholes(labels))


def test_another_is_drawn_for_one_that_is_gone_for_good(cluster: Cluster, wholes: Wholes) -> None:
    """The round begins again with whoever was in it and the next in the order of the draw."""
    whole = drawn(wholes("server").folder)
    who = whole[1][0]
    serving = cluster.serve(config_of(cluster, min_devices=len(NAMES) - 1))
    serving.state.wait_for(NAMES)
    serving.start()
    staying = cluster.start(*(n for n in NAMES if n != who), data=held_out())
    dying = cluster.client(who, sentences(ord(who)), DieAt(IN_MID_ROUND), data=held_out()).start()
    with pytest.raises(Died):
        dying.wait()

    assert serving.wait() == "completed"
    wait_all(staying)
    found = drawn(serving.folder)
    assert found[0] == whole[0]
    assert set(whole[1]) - set(found[1]) == {who}
    assert all(len(names) == PER_ROUND for names in found)


def test_a_round_for_more_than_are_here_has_all_of_them(cluster: Cluster) -> None:
    """With fewer devices than are asked for nobody waits for others."""
    serving = cluster.serve(config_of(cluster, min_devices=2, devices_per_round=4)).start()
    clients = cluster.start("a", "b", data=held_out())

    assert serving.wait() == "completed"
    wait_all(clients)
    assert drawn(serving.folder) == [["a", "b"]] * 3


def test_planned_rounds_resume_as_well(cluster: Cluster) -> None:
    """With splits and ranks that are planned a killed coordinator draws and learns alike, too."""
    planning = PlanningConfig(split="armsc", ranks="rngwp", rank_set=(2, 4), importance_every=1)
    config = config_of(cluster, planning=planning, devices={})
    profile = PROFILES["a"]  # what a device measures of itself is another number each time
    whole = complete(cluster, replace(config, name="whole"), profile=profile)
    killed = cluster.serve(config).crash_at(IN_MID_ROUND, drawn(whole.folder)[1][0]).start()
    clients = cluster.start(data=held_out(), profile=profile)
    assert killed.wait() == "crashed"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    assert_same(resumed, whole)


def test_states_are_kept_of_those_who_are_not_drawn(cluster: Cluster) -> None:
    """A device with frozen blocks that comes back after rounds without it sends nothing again."""
    default = DeviceSettings(split=2, batch_size=4, micro_batch=1, r=0, codec="float32")
    config = config_of(cluster, devices={}, default=default, rounds=8, steps_per_round=6)
    plain = complete(cluster, replace(config, name="plain"))

    kept = complete(cluster, replace(config, name="kept", replay=ReplayConfig(when="auto")))

    assert drawn(kept.folder) == drawn(plain.folder)
    assert_learned(kept, plain)
    assert sum(row.get("replayed", 0) for row in kept.rows) > 0


def test_a_killed_program_resumes_with_the_same_draws(files: Cluster, start: Start) -> None:
    """`kill -9` on `coordinator serve` in a round, then `serve --resume`: the same bytes."""
    settings = ["devices_per_round=2", "min_devices=5", "rounds=3"]

    def begin(name: str) -> list[Any]:
        words = [f"{n}.yaml" for n in NAMES]
        return [start("edge-sdk", "run", "--config", w, f"state=state-{name}") for w in words]

    def serve(name: str, *words: str) -> Any:
        return start(
            "coordinator", "serve", *words, "--config", "run.yaml", f"name={name}", *settings
        )

    whole = serve("whole")
    devices = begin("whole")
    assert [p.wait() for p in (whole, *devices)] == [0] * (1 + len(NAMES))
    killed = serve("run")
    devices = begin("run")
    killed.wait_for("round  1")
    folder, deadline = RunFolder(files.folder / "runs" / "run"), Deadline.after(PATIENCE_S)
    while len(drawn(folder)) < 2:
        assert deadline.left_s()
        time.sleep(0.02)
    killed.kill()

    resumed = serve("run", "--resume")

    assert [p.wait() for p in (resumed, *devices)] == [0] * (1 + len(NAMES))
    expected = RunFolder(files.folder / "runs" / "whole")
    assert drawn(folder) == drawn(expected)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder.path / name).read_bytes() == (expected.path / name).read_bytes()
