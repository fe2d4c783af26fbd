"""Whole runs whose coordinator keeps its blocks in 8, 4 or 16 bits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.export.run import export_run
from coordinator.results.run_folder import CONFIG
from coordinator.rounds.launch import serve
from edge_sdk.config.describe import dump_config
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import DeviceError
from edge_sdk.lora.adapters import Pair
from edge_sdk.model.layout import find_layout
from edge_sdk.model.precision import Base
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import Cluster, wait_all, write_rows
from tests.e2e.test_equals_central import SGD, SPLITS, Central, batches_of
from tests.kept_bases import keep_as
from tests.tiny import make_config

# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
HALVES = {"a": (1, 2), "b": (2, 4), "c": (4, 2)}
"""Blocks and batch size of each device."""
NEAR = {"bfloat16": 3e-8, "float16": 1e-6}
"""How near a step's factors are, whose largest numbers are about 0.3."""
BASES: tuple[Base, ...] = ("int8", "int4", "bfloat16", "float16")


def compute_of(base: Base) -> Any:
    """The dtype of products that a base needs."""
    return base if base in ("bfloat16", "float16") else "float32"


class Watcher:
    """Looks at nothing."""

    def see(self, event: object) -> None:
        """Forget what happened."""


def test_nobody_is_greeted_without_room(cluster: Cluster) -> None:
    """`serve` ends with a line of its own before it listens, and makes no folder."""
    config = cluster.config(planning=PlanningConfig(server_memory_bytes=1.0))

    with pytest.raises(DeviceError, match="are free"):
        serve(replace(config, listen="tcp://127.0.0.1:*"), Watcher())

    assert not config.runs.exists()


@pytest.mark.parametrize("base", ["int8", "int4"])
def test_three_cuts_are_one_machine_in_every_base(cluster: Cluster, base: Base) -> None:
    """Devices at 1, 2 and 4 of 5 blocks and a coordinator, quantised alike: centralised LoRA.

    In its third round one device moves a weight 10.3 times as far as the two others, and all its
    weights several times: small rounds scatter so, and nobody is left out.
    """
    devices = {n: DeviceSettings(split=k, batch_size=b) for n, (k, b) in SPLITS.items()}
    config = cluster.config(
        rounds=6,
        steps_per_round=1,
        aggregation="fedavg",
        training=SGD,
        devices=devices,
        base=base,
    )
    central = Central(config)
    keep_as(central.model, find_layout(make_config("llama"), "causal-lm"), base)
    serving = cluster.serve(config).start()
    clients = cluster.start(base=base)
    streams = {n: batches_of(n, size, cluster.model) for n, (_, size) in SPLITS.items()}

    for step in range(6):
        central.step(step, streams)
    outcome = serving.wait()
    wait_all(clients)

    assert outcome == "completed"
    joined = {w: pair for own in serving.ledger.pairs.values() for w, pair in own.items()}
    assert joined.keys() == central.targets.keys()
    for name, pair in joined.items():
        np.testing.assert_allclose(pair.a_RI, central.factor(f"{name}.A"), atol=1e-5)
        np.testing.assert_allclose(pair.b_OR, central.factor(f"{name}.B"), atol=1e-5)


@pytest.mark.parametrize("base", ["bfloat16", "float16"])
def test_three_cuts_are_one_machine_in_sixteen_bits(cluster: Cluster, base: Base) -> None:
    """Every round of such devices is a step of centralised LoRA, to the rounding of float32.

    Rounds are compared one by one: products are rounded to 16 bits, so that the last bit of a
    factor may change the third digit of the next step. Each device's rows are computed alone and
    are a power of two of all rows, as on the one machine: then both round the same numbers. float16
    also looks for its loss scale, on each side for itself, and loses some of the least gradients.
    """
    devices = {n: DeviceSettings(split=k, batch_size=b) for n, (k, b) in HALVES.items()}
    config = cluster.config(
        rounds=5,
        steps_per_round=1,
        waves="available",
        wave_tokens=1,
        aggregation="fedavg",
        training=SGD,
        devices=devices,
        base=base,
        compute=compute_of(base),
    )
    central = Central(config)
    keep_as(central.model, find_layout(make_config("llama"), "causal-lm"), base)
    learned: list[dict[str, Pair]] = []
    serving = cluster.serve(config)
    serving.trap.on_row = lambda _row: learned.append(learned_by(serving))
    serving.start()
    clients = cluster.start(base=base, compute=compute_of(base))
    streams = {n: batches_of(n, size, cluster.model) for n, (_, size) in HALVES.items()}

    outcome = serving.wait()
    wait_all(clients)

    assert outcome == "completed"
    assert len(learned) == 6
    for step, (before, after) in enumerate(pairwise(learned)):
        central.load(before)
        central.step(step, streams)
        assert after.keys() == central.targets.keys()
        for name, pair in after.items():
            for letter, found in zip("AB", pair, strict=True):
                expected = central.factor(f"{name}.{letter}")
                np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR[base])


def learned_by(serving: Any) -> dict[str, Pair]:
    """The factors that all hold now, by weight."""
    pairs = (item for own in serving.ledger.pairs.values() for item in own.items())
    return {weight: Pair(*(factor.copy() for factor in pair)) for weight, pair in pairs}


def evaluated(cluster: Cluster, base: Base, tmp_path: Path, **settings: Any) -> ServeConfig:
    """A run that evaluates, tests and asks by itself."""
    rows = write_rows(tmp_path / "dev.jsonl", [{"text": "a boat"}, {"text": "at noon"}])
    evaluation = EvaluationConfig(
        data=DataConfig(path=str(rows)), prompts=("a b",), max_new_tokens=4, test_file=str(rows)
    )
    return cluster.config(
        base=base,
        compute=compute_of(base),
        evaluation=evaluation,
        training=TrainingConfig(learning_rate=1e-2),
        **settings,
    )


@pytest.mark.parametrize("base", BASES)
def test_a_stopped_run_goes_on_to_the_bit(cluster: Cluster, base: Base, tmp_path: Path) -> None:
    """Stopped inside a round and resumed, a run learns what a straight one does; PEFT reads it."""
    straight = evaluated(cluster, base, tmp_path, name="straight")
    first = cluster.serve(straight).start()
    clients = cluster.start(state=cluster.folder / "state-straight")
    assert first.wait() == "completed"
    wait_all(clients)
    config = replace(straight, name="stopped")
    stopped = cluster.serve(config).stop_at(4).start()
    clients = cluster.start()
    assert stopped.wait() == "paused"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    whole, again = first.ledger.state(), resumed.ledger.state()
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    assert scores(first) == scores(resumed)
    resumed.folder.write_text(CONFIG, dump_config(config))
    assert export_run(resumed.folder, tmp_path / "out") < 1e-5  # PEFT on the original model


def scores(serving: Any) -> list[Any]:
    """What the coordinator's own file was evaluated to."""
    return [row["eval"]["loss"] for row in serving.rows]
