"""A sweep trains as a run does, with a rate that grows, and says what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.engine.server_model import ServerModel
from coordinator.lab.centralised.trainer import POOLED, PooledTrainer
from coordinator.lab.rates.sweep import SweepConfig, find_rate
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import Stamp
from tests.coordinator.lab.centralised.centralised_runs import ADAMW, make_config
from tests.e2e.cluster import save_model, sentences, write_rows
from tests.e2e.programs import write_yaml


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def losses(trainer: PooledTrainer, training: Any = None) -> list[float]:
    """Losses of some steps, with another rate told to the optimizer where there is one."""
    if training is not None:
        trainer.runtime.state.optimizer.go_by(training)
    stamps = [Stamp(run="r", device=POOLED, round=0, step=step) for step in range(4)]
    return [trainer.train(stamp).loss for stamp in stamps]


def test_a_rate_that_is_told_later_counts_as_one_of_the_config(model: Path, tmp_path: Path) -> None:
    """An optimizer that is told a rate trains, to the bit, as one that was made with it."""
    training = replace(ADAMW, learning_rate=3e-2, lr_scheduler_type="constant", warmup_steps=0)
    config = make_config(model, tmp_path, training=training)
    other = replace(config, training=replace(ADAMW, learning_rate=1e-6))
    rows = sentences(1)

    expected = losses(PooledTrainer(config, ServerModel(config), rows))
    found = losses(PooledTrainer(other, ServerModel(other), rows), training)

    assert found == expected


def test_a_sweep_finds_the_same_every_time(model: Path, tmp_path: Path) -> None:
    """One seed gives one sweep; its rates grow, and the loss falls on data that can be learned."""
    config = make_config(model, tmp_path)
    wanted = SweepConfig(first=1e-5, last=1e-1, steps=14)

    first, second = (find_rate(config, wanted) for _ in range(2))

    assert first == second
    assert first.data == "the run's evaluation file"
    assert first.batch_size == 6
    assert [p.rate for p in first.points] == sorted(p.rate for p in first.points)
    assert first.found.steepest is not None


def test_the_command_says_what_it_assumed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A table, a rate, assumptions and a picture, in 80 columns; the same as JSON."""
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "run.yaml", {"model": str(model), "device": "cpu"})
    write_rows(tmp_path / "texts.jsonl", sentences(1))
    words = ["lr-find", "--config", "run.yaml", "--steps", "12", "--from", "1e-4"]

    assert main([*words, "--data", "texts.jsonl"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert main([*words, "--format", "json", "--plot", "p.png"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert max(map(len, shown)) <= 80
    assert shown[0].split() == ["rate", "loss"]
    assert any(line.startswith("suggested: training.learning_rate=") for line in shown)
    assert "trained on texts.jsonl" in "\n".join(shown)
    assert (tmp_path / "lr-find.svg").read_text().startswith("<?xml")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert found["data"] == "generated texts"
    assert len(found["points"]) == 12


def test_what_cannot_be_swept_is_refused() -> None:
    """Rates that do not grow, and too few steps, are named."""
    with pytest.raises(ConfigError, match="must be above 0, and grow"):
        SweepConfig(first=1e-1, last=1e-3)
    with pytest.raises(ConfigError, match="at least 10"):
        SweepConfig(steps=3)
