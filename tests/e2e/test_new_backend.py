"""A new backend is one class and one registration: it takes part in a run like any other."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from edge_sdk.client.backends import BACKENDS, ONNXRUNTIME, RuntimeRequest
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.factors import Array
from edge_sdk.lora.numpy_adapters import NumpyAdapters
from edge_sdk.lora.targets import Shape
from edge_sdk.model.safetensors_files import map_part
from edge_sdk.runtime.interface import process_memory
from edge_sdk.runtime.numpy_optimizer import NumpyOptimizer
from edge_sdk.runtime.training_state import NumpyTrainingState
from tests.e2e.cluster import Cluster, wait_all


class Lookup:
    """Sends embeddings on as if its blocks did nothing, and learns nothing; numpy alone."""

    def __init__(self, request: RuntimeRequest) -> None:
        stored = {n: t for part in request.parts for n, t in map_part(request.fetch(part)).items()}
        plan, training = request.plan, request.training
        shapes = {n: Shape(*stored[f"{n}.weight"].array.shape) for n in plan.ranks}
        adapters = NumpyAdapters(shapes, plan.ranks, plan.alphas, request.lora, training.seed)
        optimizer = NumpyOptimizer(adapters.parameters, training, request.total_steps)
        self.state = NumpyTrainingState(adapters, optimizer, plan.ranks, {}, deque())
        self.step = optimizer.step
        self.table = stored["model.embed_tokens.weight"].float32()

    def forward(self, micro: MicroBatch, _step: int = 0, _index: int = 0) -> Array:
        """Look the tokens up."""
        return self.table[micro.input_ids]

    def backward(self, grad_BTD: Array) -> None:
        """Take the gradient in, which moves nothing."""
        assert grad_BTD.any()

    def never(self, *_: Any) -> Any:
        """Fail: with labels and last blocks elsewhere nobody asks."""
        raise NotImplementedError

    forward_eval, tail, tail_eval, local = forward, never, never, never
    memory_in_use = staticmethod(process_memory)
    most_bytes = staticmethod(lambda: 1 << 20)


def test_a_new_backend_takes_part(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """One registration; the run is completed, and what stays on its side has not moved."""
    lookup = replace(ONNXRUNTIME, name="lookup", needs=("numpy",), make=Lookup, wants_graphs=False)
    monkeypatch.setitem(BACKENDS, "lookup", lookup)
    own = cluster.config(aggregation="exact")  # after a round everybody has what they brought
    serving = cluster.serve(own).start()
    clients = cluster.start("a", "b", backend="torch") + cluster.start("c", backend="lookup")

    assert serving.wait() == "completed"
    wait_all(clients)
    mine = serving.ledger.pairs["c"]
    assert mine.keys() == serving.admission.plans["c"].ranks.keys()
    assert not any(pair.b_OR.any() for pair in mine.values())
    assert all(pair.b_OR.any() for pair in serving.ledger.pairs["a"].values())
