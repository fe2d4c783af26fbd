"""Whatever is wrong is said in one line, with its own exit code, and hurts nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.cli import main as coordinator_main
from tests.e2e.cluster import (
    Cluster,
    write_yaml,
)

HIDDEN = 32

# ---- the coordinator, before it starts --------------------------------------------------------------


@pytest.fixture
def run_yaml(cluster: Cluster) -> Path:
    """A configuration that would work."""
    return write_yaml(
        cluster.folder / "run.yaml",
        {
            "model": str(cluster.model),
            "listen": "tcp://127.0.0.1:*",
            "secret_key": "coordinator.key",
            "allow_list": "devices.yaml",
            "runs": "runs",
            "device": "cpu",
        },
    )


def refuse(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Serve, expect *code* and one line on stderr; returns the line."""
    capsys.readouterr()
    assert coordinator_main(["serve", "--config", *arguments]) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    assert lines[0].startswith("coordinator: ")
    return lines[0]


CONFIGS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "unknown key": ("rouds=3", 2, ("rouds", "did you mean", "rounds")),
    "wrong type": ("rounds=many", 2, ("rounds", "many")),
    "split 0": ("default.split=0", 2, ("default.split", "0", "1..5")),
    "split 9": ("devices.b.split=9", 2, ("devices.b.split", "9", "1..5")),
    "rank": ("default.r=33", 2, ("rank 33", "0..32")),
    "micro-batch": ("default.micro_batch=3", 2, ("default.micro_batch", "3", "batch_size 8")),
    "target": ("lora.target_modules=[qkv]", 2, ("lora.target_modules", "qkv", "q_proj")),
    "length": ("max_length=65", 2, ("max_length", "65", "64")),
    "key": ("secret_key=absent.key", 2, ("absent.key", "cannot read")),
    "missing model": ("model=./absent", 8, ("absent", "does not exist")),
    "missing data": ("evaluation.data.path=absent.jsonl", 7, ("absent.jsonl",)),
    "fedavg": ("[aggregation=fedavg,server_rank=3]", 2, ("fedavg", "equal ranks")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_work(
    cluster: Cluster, run_yaml: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """The key, the value and what is allowed; and no run folder."""
    override, code, words = CONFIGS[case]

    line = refuse(capsys, code, str(run_yaml), *override.strip("[]").split(","))

    assert all(word in line for word in words), line
    assert not (cluster.folder / "runs").exists()
