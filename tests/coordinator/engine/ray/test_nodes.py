"""A cluster of several nodes, and what comes of a run when one of them goes away.

They are nodes of Ray on this machine, with processes of their own; what no test here can take away
is a machine with its network.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.engine.interface import Engine
from coordinator.engine.ray import cluster as ray_cluster
from coordinator.engine.ray.engine import RayEngine
from edge_sdk.errors import EdgeError
from tests.coordinator.engine.ray.engines import Both, assert_equal_states, both
from tests.coordinator.engine.test_local import make_jobs

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

HERE = {"node_ip_address": "127.0.0.1", "include_dashboard": False}


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster of three nodes that have room for one actor each, and one that has none."""
    ray_cluster.prepare_local()
    from ray.cluster_utils import Cluster

    made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **HERE})
    try:
        for _ in range(3):
            made.add_node(num_cpus=1, **HERE)
        yield made
    finally:
        made.shutdown()


def test_a_lost_node_costs_a_step_while_there_is_room_elsewhere(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its actor begins anew on another node, nothing counts twice; without one, the run ends."""
    wanted = {"address": nodes.address, "cpus_per_actor": 1.0}
    with both(tmp_path, "llama", (2, 1), **wanted) as engines:
        assert isinstance(engines.other, RayEngine)
        train(engines, engines.other, 0)
        engines.other.train(make_jobs("llama"), 1, 0)

        lose_node(nodes, engines.other)
        train(engines, engines.other, 1, wave=1)

        assert "engine.lost" in caplog.text
        train(engines, engines.local, 0)
        engines.local.train(make_jobs("llama"), 1, 0)
        train(engines, engines.local, 1, wave=1)
        assert_equal_states(engines.other, engines.local)

        monkeypatch.setattr(ray_cluster, "RESTART_S", 5.0)
        lose_node(nodes, engines.other)
        with pytest.raises(EdgeError) as caught:
            train(engines, engines.other, 2)
        text = str(caught.value)
        assert text.startswith("engine: an actor is gone, and none could take its place within 5 s")
        assert "; the cluster has " in text
        assert "\n" not in text


def train(engines: Both, engine: Engine, step: int, wave: int = 0) -> None:
    """Run one wave, and end its step."""
    answers = engine.train(make_jobs(engines.family), step, wave)
    assert all(np.isfinite(answer.grad_BTD).all() for answer in answers)
    assert engine.finish_step(step)


def lose_node(nodes: Any, engine: RayEngine) -> None:
    """Kill all processes of the node on which the last actor runs, the actor's among them."""
    import ray

    actor: Any = engine._chains._actors[-1]
    pid = ray.get(actor.do.remote(engine._chains._epoch, "pid"))
    where = ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
    node = next(node for node in nodes.worker_nodes if node.node_id == where)
    nodes.remove_node(node, allow_graceful=False)
    # It would end by itself when it misses its node, but not before it has finished a wave or two.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
