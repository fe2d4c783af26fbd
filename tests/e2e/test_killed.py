"""A device that the kernel kills for memory gets a smaller plan, as if it had said so itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.config.run import DeviceSettings
from edge_sdk.client.callbacks import Callback
from edge_sdk.protocol.plan import Plan
from edge_sdk.running_note import RunningNote
from tests.e2e.cluster import Cluster, save_model, sentences, wait_all, write_rows
from tests.e2e.programs import write_yaml
from tests.memory_group import memory_group

MIB = 2**20
LONG_S = 240.0
# Measured: twelve sequences of this length take 1370 MiB with the files of libraries, six 960.
LIMIT_BYTES = 1100 * MIB
LENGTH = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activations are what takes memory."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    return save_model(
        "llama", tmp_path_factory.mktemp("model"), max_position_embeddings=LENGTH, **size
    )


@pytest.fixture
def cluster(tmp_path: Path, model: Path, parts: Path) -> Iterator[Cluster]:
    """A coordinator of one device."""
    made = Cluster(tmp_path, model, parts, ["a"])
    yield made
    made.close()


def device_config(cluster: Cluster, text: str) -> Path:
    """Write the configuration of device `a` and its rows."""
    rows = [{"text": (row["text"] + " ") * LENGTH} for row in sentences(1, 12)]
    path = write_rows(cluster.folder / "a.jsonl", rows)
    settings = {
        "coordinator": cluster.address,
        "server_key": cluster.public,
        "secret_key": str(cluster.folder / "a.key"),
        "data": {"path": str(path), "too_long": "cut"},
        "cache": str(cluster.parts),
        "state": str(cluster.folder / "state"),
        "device": "cpu",
        "threads": 1,
    }
    return write_yaml(cluster.folder / text, settings)


def test_a_supervised_device_that_is_killed_for_memory_gets_a_smaller_plan(
    cluster: Cluster,
) -> None:
    """Killed in a real control group, started again, given half the micro-batch, and it is done."""
    default = DeviceSettings(split=2, batch_size=12, codec="float32")
    serving = cluster.serve(
        cluster.config(default=default, rounds=1, steps_per_round=2, max_length=LENGTH)
    ).start()
    config = device_config(cluster, "a.yaml")
    program = str(Path(sys.executable).with_name("edge-sdk"))
    words = [program, "run", "--supervise", "--config", str(config)]
    with memory_group() as group:
        group.limit(LIMIT_BYTES)
        device = subprocess.Popen(
            group.command(words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            said, _ = device.communicate(timeout=LONG_S)
        finally:
            device.kill()

    assert device.returncode == 0, said
    assert serving.wait() == "completed"
    assert "edge-sdk: killed by the kernel: out of memory; starting again in 1 s" in said
    assert any("ran out of memory: micro-batch 12 -> 6" in note for note in serving.trap.notes)
    assert serving.rows[-1]["samples"] == 24
    assert not list((cluster.folder / "state").rglob("running.json"))


@pytest.mark.parametrize("killed", [True, False], ids=["by the kernel", "by somebody"])
def test_a_device_that_systemd_starts_again_finds_out_what_killed_it(
    cluster: Cluster, killed: bool
) -> None:
    """A note that was left tells of want of memory if the kernel has killed since, else nothing."""
    default = DeviceSettings(split=2, batch_size=4, codec="float32")
    serving = cluster.serve(cluster.config(default=default)).start()
    note = RunningNote(cluster.folder / "state" / "run-1" / "a")
    note.write("2 blocks, micro-batches of 4")
    if killed:  # one more than then; in another group, as systemd makes them anew
        file = next((cluster.folder / "state").rglob("running.json"))
        found = json.loads(file.read_text())
        found |= {"group": "another", "on_machine": (found["on_machine"] or 0) - 1}
        file.write_text(json.dumps(found))
    plans: list[Plan] = []
    told = Callback()
    told.on_plan = plans.append  # type: ignore[method-assign]

    client = cluster.client("a", sentences(1), told).start()

    assert serving.wait() == "completed"
    wait_all([client])
    assert [plan.micro_batch for plan in plans] == ([2] if killed else [4])
    line = "a ran out of memory: micro-batch 4 -> 2"
    assert (line in serving.trap.notes) == killed
    assert not list((cluster.folder / "state").rglob("running.json"))
