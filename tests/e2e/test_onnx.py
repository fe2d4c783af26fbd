"""A device without torch takes part like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load, save

from coordinator.onnx_export.cache import GraphCache
from edge_sdk.errors import ConfigError, ModelError, RefusedError
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.protocol.plan import Part
from tests.e2e.cluster import PATIENCE_S, Cluster, Serving, held_out, sentences, wait_all
from tests.runtimes import BACKENDS

# Far above the rounding of 6 steps, far below what one wrong gradient would make of them.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4

DEVICE = """
import json, sys
for name in ("torch", "transformers", "peft"):
    sys.modules[name] = None  # as on a device where they are not installed
from pathlib import Path
from edge_sdk import ClientConfig, DataConfig, EdgeClient
settings, rows = json.loads(sys.argv[1])
for name in ("secret_key", "cache", "state"):
    settings[name] = Path(settings[name])
settings["data"] = DataConfig(validation_fraction=0.25)
reason = EdgeClient(ClientConfig(**settings), rows).run()
print(json.dumps([reason, [n for n, m in sys.modules.items() if n == "onnxruntime" and m]]))
"""


@pytest.fixture
def pair(tmp_path: Path, llama: Path, parts: Path) -> Any:
    """Devices a and b."""
    made = Cluster(tmp_path, llama, parts, ("a", "b"))
    yield made
    made.close()


@pytest.fixture
def start_lean(pair: Cluster) -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Start a device in a process that cannot import torch; it is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, backend: str) -> subprocess.Popen[str]:
        settings = {
            "coordinator": pair.address,
            "server_key": pair.public,
            "secret_key": str(pair.folder / f"{name}.key"),
            "cache": str(pair.folder / "lean-parts"),
            "state": str(pair.folder / f"lean-{backend}"),
            "threads": 1,
            "backend": backend,
        }
        command = [sys.executable, "-c", DEVICE, json.dumps([settings, sentences(ord(name))])]
        root = Path(__file__).parents[2]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def losses(serving: Serving) -> list[list[float]]:
    """Training and validation losses by round."""
    names = ("train_loss", "eval_loss")
    return [[row[n] for n in names if n in row] for row in serving.rows[1:]]


def test_a_mixed_run_learns_what_a_torch_run_learns(
    pair: Cluster, start_lean: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    """One device with torch and one that cannot import it: same losses, same dW."""
    found = {}
    for kind in BACKENDS:
        serving = pair.serve(pair.config(name=kind, labels="device")).start()
        names = ("a", "b") if kind == "torch" else ("a",)
        clients = pair.start(*names, data=held_out(), state=pair.folder / kind)
        lean = start_lean("b", kind) if kind != "torch" else None
        assert serving.wait(6 * PATIENCE_S) == "completed"
        wait_all(clients)
        if lean is not None:
            out, _ = lean.communicate(timeout=PATIENCE_S)
            assert json.loads(out) == ["the run is complete", ["onnxruntime"]]
        found[kind] = losses(serving), serving.ledger.global_factors()

    torch_losses, torch_learned = found.pop("torch")
    for mixed_losses, mixed_learned in found.values():
        np.testing.assert_allclose(mixed_losses, torch_losses, rtol=LOSS_TOLERANCE)
        for name, factors in torch_learned.items():
            np.testing.assert_allclose(
                mixed_learned[name].dense(), factors.dense(), atol=WEIGHT_TOLERANCE
            )


def test_dropout_is_refused_with_a_cure(pair: Cluster) -> None:
    """The run goes on with devices that have torch; the other one is told what to change."""
    pair.serve(pair.config(lora=LoraConfig(r=4, lora_dropout=0.1))).start()
    client = pair.client("b", sentences(0), backend="onnxruntime").start()

    with pytest.raises(RefusedError, match=r"lora_dropout: 0.1 is not possible.*set it to 0"):
        wait_all([client])


def test_a_local_model_needs_torch(pair: Cluster) -> None:
    """A folder that only transformers can read is refused before anything is fetched."""
    with pytest.raises(ConfigError, match="model: .* is not possible with the onnxruntime"):
        pair.client("b", sentences(0), backend="onnxruntime", model=str(pair.model)).run()


def test_a_graph_that_reads_a_file_never_runs(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A coordinator sends a graph with data in `device.key`: the device says no, others go on."""
    honest = GraphCache._store

    def altered(cache: GraphCache, key: str, data: bytes) -> Part:
        files = load(data)
        model = onnx.load_from_string(files["front"].tobytes())
        tensor = model.graph.initializer.add(name="key", data_type=1, dims=[10])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="device.key")
        files["front"] = np.frombuffer(model.SerializeToString(), np.uint8)
        return honest(cache, key, save(files))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GraphCache, "_store", altered)
    pair.parts = tmp_path / "own-parts"  # no graphs of other tests
    serving = pair.serve(pair.config(min_devices=1)).start()
    with pytest.raises(ModelError, match=r"graph 'front' is refused, .*: it holds field 1[34] of"):
        pair.client("a", sentences(1), backend="onnxruntime").run()
    client = pair.client("b", sentences(2)).start()

    assert serving.wait() == "completed"
    wait_all([client])
    assert any("ModelError: graph 'front' is refused" in note for note in serving.trap.notes)
