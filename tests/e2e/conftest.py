"""Tiny models on disk, with a tokenizer of single characters; made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, save_model, sentences, write_rows
from tests.e2e.programs import Program, Start, free_port, write_yaml


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of five blocks."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of five blocks."""
    return save_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where parts of models are kept; shared, as by the devices of one machine."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def cluster(tmp_path: Path, llama: Path, parts: Path) -> Iterator[Cluster]:
    """Keys of a coordinator and of devices a, b and c, around the causal model."""
    made = Cluster(tmp_path, llama, parts)
    yield made
    made.close()


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Start]:
    """Start a program in the cluster's folder; it is ended with the test."""
    programs: list[Program] = []

    def begin(name: str, *arguments: str, is_cold: bool = False, **environment: str) -> Program:
        folder = cluster.folder
        programs.append(Program(name, *arguments, cwd=folder, is_cold=is_cold, **environment))
        return programs[-1]

    yield begin
    for program in programs:
        program.kill()


@pytest.fixture
def files(cluster: Cluster) -> Cluster:
    """Configurations of a coordinator and of devices a, b and c in the cluster's folder."""
    address = f"tcp://127.0.0.1:{free_port()}"
    (cluster.folder / "coordinator.pub").write_text(cluster.public)
    write_yaml(
        cluster.folder / "run.yaml",
        {
            "model": str(cluster.model),
            "listen": address,
            "secret_key": "coordinator.key",
            "allow_list": "devices.yaml",
            "runs": "runs",
            "name": "run",
            "rounds": 2,
            "steps_per_round": 3,
            "min_devices": 2,
            "default": {"split": 2, "batch_size": 4, "codec": "float32"},
            "device": "cpu",
        },
    )
    for name in cluster.names:
        settings: dict[str, Any] = {
            "coordinator": address,
            "server_key": "coordinator.pub",
            "secret_key": f"{name}.key",
            "data": {"path": f"{name}.jsonl", "validation_fraction": 0.25},
            "cache": str(cluster.parts),
            "device": "cpu",
        }
        write_yaml(cluster.folder / f"{name}.yaml", settings)
        write_rows(cluster.folder / f"{name}.jsonl", sentences(ord(name)))
    return cluster
