"""Runs that end when nothing gets better: the best model is the result, whatever happens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.config.early_stopping import EarlyStoppingConfig
from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.export.outcome import write_result
from coordinator.export.run import export_run
from coordinator.lab.centralised.run import export_pooled, resume_pooled, train_pooled
from coordinator.results.events.event import RunEvent
from coordinator.results.events.run import AlreadyComplete
from coordinator.results.run_folder import CONFIG, TEST_RESULTS, RunFolder
from coordinator.rounds.launch import resume
from edge_sdk.config.describe import dump_config
from edge_sdk.data.rows import DataConfig
from edge_sdk.runtime.training import TrainingConfig
from tests.coordinator.lab.centralised.centralised_runs import make_config
from tests.e2e.cluster import Cluster, Serving, held_out, sentences, wait_all, write_rows

# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
# The rate is the same whatever the number of rounds, so that shorter runs are beginnings of longer.
CONSTANT = TrainingConfig(learning_rate=5e-3, lr_scheduler_type="constant")
PATIENT = EarlyStoppingConfig(patience_rounds=2)
# Letters that no device has, which become less likely with each round.
OTHERS = [{"text": "ZQXJ KVWY 0123 98765"}, {"text": "JJ QQ XX ZZ 444"}]


def config_of(cluster: Cluster, **settings: Any) -> ServeConfig:
    """A run that gets worse from its first round on."""
    path = str(write_rows(cluster.folder / "others.jsonl", OTHERS))
    evaluation = EvaluationConfig(data=DataConfig(path=path), test_file=path)
    settings = {"rounds": 9, "early_stopping": PATIENT, "evaluation": evaluation, **settings}
    return cluster.config(training=CONSTANT, save_total_limit=1, **settings)


def complete(cluster: Cluster, config: ServeConfig, **data: Any) -> Serving:
    """A run to its end."""
    serving = cluster.serve(config).start()
    clients = cluster.start(**data)
    assert serving.wait() == "completed"
    wait_all(clients)
    serving.folder.write_text(CONFIG, dump_config(config))
    return serving


def weights(adapter: Path) -> bytes:
    """The tensors of an adapter."""
    return (adapter / "adapter_model.safetensors").read_bytes()


def result(serving: Serving) -> bytes:
    """The result of a run as it is written at its end."""
    about = serving.config, serving.model, serving.ledger
    write_result(serving.folder, *about, serving.coordinator.watcher)
    return weights(serving.folder.path / "adapter")


def test_the_best_model_is_the_result(cluster: Cluster) -> None:
    """A run that gets worse ends by its patience; its result is what its best round had made.

    Paused on the way, it ends where an undisturbed one does; tested, it is as good as it was then.
    """
    off = EarlyStoppingConfig()
    short = replace(config_of(cluster), rounds=1, name="short", early_stopping=off)
    best = complete(cluster, short, state=cluster.folder / "short")
    expected = result(best)
    config = config_of(cluster)
    paused = cluster.serve(config).stop_at(7).start()
    clients = cluster.start()
    assert paused.wait() == "paused"

    serving = cluster.serve(config).start()

    assert serving.wait() == "completed"
    wait_all(clients)
    serving.folder.write_text(CONFIG, dump_config(config))
    losses = [line["eval"]["loss"] for line in serving.rows]
    assert losses[1] < losses[2] < losses[3]
    assert [line["round"] for line in serving.rows] == [0, 1, 2, 3]
    steps = [path.name for path in serving.folder.checkpoints()]
    assert steps == ["checkpoint-000003", "checkpoint-000009"]
    found = result(serving)
    assert found == expected
    export_run(serving.folder, cluster.folder / "again")
    assert weights(cluster.folder / "again") == found
    tested = json.loads((serving.folder.path / TEST_RESULTS).read_bytes())
    assert tested["round"] == 1
    assert tested["test_loss"] == pytest.approx(losses[1], rel=1e-5)
    kinds = [line["event"] for line in serving.events]
    assert kinds.count("ended.early") == kinds.count("best.chosen") == 1
    card = (serving.folder.path / "adapter" / "README.md").read_text()
    assert f"| model of round | 1, best eval_loss {losses[1]:.4f} |" in card
    assert f"| test loss | {tested['test_loss']:.4f} |" in card


class Seen:
    """A watcher that keeps what it sees."""

    def __init__(self) -> None:
        self.kinds: list[type] = []

    def see(self, event: RunEvent) -> None:
        """Keep its kind."""
        self.kinds.append(type(event))


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_what_devices_measure_is_known_a_round_later(cluster: Cluster, mode: Any) -> None:
    """Without a file the devices' data decides, with a barrier or without, one round later.

    Resumed, such a run is complete.
    """
    never = EarlyStoppingConfig(patience_rounds=1, threshold=1e6)
    settings = {"early_stopping": never, "evaluation": EvaluationConfig(), "round_mode": mode}
    settings["aggregation"] = "exact"

    serving = complete(cluster, config_of(cluster, **settings), data=held_out())

    assert [line["round"] for line in serving.rows] == [0, 1, 2, 3]
    result(serving)
    seen = Seen()
    assert resume(serving.folder.path, seen, []) == "completed"
    assert seen.kinds[0] is AlreadyComplete


def test_a_run_without_devices_ends_early_too(llama: Path, tmp_path: Path) -> None:
    """Trained by the coordinator, the best model is exported, and `resume` finds it complete."""
    path = str(write_rows(tmp_path / "others.jsonl", OTHERS))
    evaluation = EvaluationConfig(data=DataConfig(path=path), test_file=path)
    config = make_config(
        llama,
        tmp_path,
        rounds=9,
        training=CONSTANT,
        evaluation=evaluation,
        early_stopping=PATIENT,
        save_total_limit=1,
    )
    short = replace(config, rounds=1, name="short", early_stopping=EarlyStoppingConfig())
    train_pooled(short, sentences(1))

    result = train_pooled(config, sentences(1))

    assert [line["round"] for line in result.rows] == [0, 1, 2, 3]
    best = weights(config.runs / "short" / "adapter")
    assert weights(result.folder / "adapter") == best
    export_pooled(RunFolder(result.folder), tmp_path / "again")
    assert weights(tmp_path / "again") == best
    tested = json.loads((result.folder / TEST_RESULTS).read_bytes())
    assert tested["test_loss"] == pytest.approx(result.rows[1]["eval"]["loss"], rel=1e-5)
    seen = Seen()
    assert resume_pooled(result.folder, seen, []) == "completed"
    assert seen.kinds == [AlreadyComplete]
