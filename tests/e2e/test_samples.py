"""Texts that a run shows of its model, and those that a person asks of it later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.config.run import EvaluationConfig
from coordinator.lab.centralised.run import train_pooled
from coordinator.results.run_folder import CONFIG, SAMPLES
from edge_sdk.config.describe import dump_config
from tests.coordinator.lab.centralised.centralised_runs import make_config
from tests.e2e.cluster import Cluster, sentences, wait_all

# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PROMPTS = ("red boat", "the old")
EVALUATION = EvaluationConfig(prompts=PROMPTS, max_new_tokens=8, every_rounds=2)


def asked(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> list[dict[str, Any]]:
    """What `coordinator generate` answers to the run's own prompts."""
    assert main(["generate", str(folder), "--format", "json", *words]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["samples"]
    return found


def test_a_run_shows_what_its_model_says(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts come with each evaluation, once whatever happens, and can be asked for later."""
    config = cluster.config(rounds=3, evaluation=EVALUATION)
    stopped = cluster.serve(config).stop_at(7).start()
    clients = cluster.start()
    assert stopped.wait() == "paused"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    rows = resumed.folder.rows(SAMPLES)
    where = [(row["round"], row["prompt"]) for row in rows]
    assert where == [(round_, prompt) for round_ in (0, 2, 3) for prompt in PROMPTS]
    noted = [note for note in stopped.trap.notes if note.startswith("after")]
    assert noted[0].startswith('after 0 rounds, "red boat": "')
    resumed.folder.write_text(CONFIG, dump_config(config))
    for round_, words in ((3, ()), (2, ("--round", "2")), (0, ("--round", "0"))):
        expected = [(row["prompt"], row["text"]) for row in rows if row["round"] == round_]
        found = asked(capsys, resumed.folder.path, *words)
        assert [(one["prompt"], one["text"]) for one in found] == expected


@pytest.mark.parametrize("trains", ["adapters", "all"])
def test_a_run_without_devices_shows_it_too(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trains: str
) -> None:
    """Where the coordinator trains alone, texts are in the same file and can be asked for."""
    config = make_config(llama, tmp_path, trains=trains, evaluation=EVALUATION)

    result = train_pooled(config, sentences(1))

    rows = [json.loads(line) for line in (result.folder / SAMPLES).read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 0, 2, 2]
    found = asked(capsys, result.folder)
    assert [one["text"] for one in found] == [row["text"] for row in rows[2:]]
