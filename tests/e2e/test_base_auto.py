"""`base: auto` in real runs: the same bits as what it has chosen, told, and kept over restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.offer.base_choice import MOST_SHARE
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.model.shape import model_shape
from edge_sdk.model.weights import load_config
from profiler.estimate.memory import estimate_memory
from profiler.estimate.sizes import Work
from profiler.profile import DeviceProfile
from tests.e2e.cluster import Cluster, sentences, wait_all

MIB = 2**20
ROOMY = DeviceProfile(memory_bytes=5e8, overhead_bytes=1e6, flops_per_s=1e9)
# Less than what any of it takes.
TIGHT = DeviceProfile(memory_bytes=1.7e7, overhead_bytes=1e6, flops_per_s=1e9)


ONE = DeviceSettings(batch_size=2, micro_batch=1, codec="float32")


@pytest.fixture
def cluster(tmp_path: Path, llama: Path, parts: Path) -> Iterator[Cluster]:
    """Two devices are enough."""
    made = Cluster(tmp_path, llama, parts, ("a", "b"))
    yield made
    made.close()


@dataclass
class Heard(Callback):
    """What a device says on its terminal."""

    lines: list[str] = field(default_factory=list)

    def on_status(self, doing: str) -> None:
        """Keep it."""
        self.lines.append(doing)


def train(cluster: Cluster, name: str, *, rounds: int = 2, **settings: Any) -> tuple[bytes, Heard]:
    """Run with devices of these settings; return the metrics, and what one of them has said."""
    serving = cluster.serve(cluster.config(name=name, rounds=rounds)).start()
    heard = Heard()
    clients = [
        cluster.client(
            device,
            sentences(ord(device)),
            heard if device == "a" else None,
            state=cluster.folder / f"state-{name}",
            **settings,
        ).start()
        for device in cluster.names
    ]
    assert serving.wait() == "completed"
    wait_all(clients)
    return serving.metrics, heard


@pytest.mark.parametrize(("profile", "base"), [(ROOMY, "float32"), (TIGHT, "int8")])
def test_a_run_has_the_bits_of_what_was_chosen(
    cluster: Cluster, profile: DeviceProfile, base: str
) -> None:
    """With room it is the default bit for bit, without it int8; either is said with its reason."""
    expected, _ = train(cluster, "told", base=base, profile=profile)
    found, heard = train(cluster, "auto", base="auto", profile=profile)

    assert found == expected
    [line] = [line for line in heard.lines if line.startswith("base: ")]
    assert line.startswith(f"base: auto is {base}: 2 of 5 blocks take ")
    assert ("MiB in int8" in line) == (base == "int8")


def test_a_restart_goes_on_with_what_was_chosen(cluster: Cluster) -> None:
    """A device that has more memory by then does not change its numbers in the middle of a run."""
    whole, _ = train(cluster, "whole", base="int8", profile=TIGHT)
    serving = cluster.serve(cluster.config(name="cut")).stop_at(2).start()
    clients = cluster.start(base="auto", profile=TIGHT)
    assert serving.wait() == "paused"
    for client in clients:
        client.stop()
    wait_all(clients)

    again = cluster.serve(cluster.config(name="cut")).start()
    clients = cluster.start(base="auto", profile=ROOMY)
    assert again.wait() == "completed"
    wait_all(clients)

    assert again.metrics == whole
    notes = [json.loads(path.read_text()) for path in cluster.folder.glob("state/*/*/base.json")]
    assert [note["base"] for note in notes] == ["int8"] * 2


def just_too_little(cluster: Cluster) -> float:
    """Return a budget that float32 weights of all blocks would fill by more than their share."""
    config = load_config(cluster.model, 0)
    layout = find_layout(config, "causal-lm")
    shape = model_shape(config, "causal-lm", layout)
    ranks = dict.fromkeys(find_targets(config, "causal-lm", layout, LoraConfig()), 4)
    work = Work(
        first=0,
        stop=layout.num_blocks,
        has_front=True,
        has_tail=True,
        ranks=ranks,
        micro_batch=1,
        length=40,
    )
    return estimate_memory(shape, work).total / MOST_SHARE - 1


def test_a_planner_is_told_what_was_chosen(cluster: Cluster) -> None:
    """Where plans wait for profiles, int8 weights are what the plan is made for."""
    planning = PlanningConfig(split="armsc", server_memory_bytes=512 * MIB, server_flops_per_s=4e9)
    serving = cluster.serve(cluster.config(planning=planning, max_length=40, default=ONE)).start()
    link = DeviceProfile(up_bytes_per_s=1e7, down_bytes_per_s=1e7, round_trip_s=0.01)
    small = replace(
        link, memory_bytes=just_too_little(cluster), overhead_bytes=0.0, flops_per_s=1e9
    )
    large = replace(small, memory_bytes=256 * MIB)
    heard = Heard()
    clients = [
        cluster.client(name, sentences(ord(name)), heard if name == "a" else None, **settings)
        for name, settings in {
            "a": {"base": "auto", "profile": small},
            "b": {"profile": large},
        }.items()
    ]
    for client in clients:
        client.start()

    assert serving.wait() == "completed"
    wait_all(clients)

    told = {name: serving.planner.profiles[name].linear_bytes for name in "ab"}
    assert told == {"a": 1.0, "b": None}
    assert "5 of 5 blocks" in next(line for line in heard.lines if line.startswith("base: "))
