"""A run on pooled data is plain fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from coordinator.config.centralised import PooledConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.lab.centralised.run import train_pooled
from coordinator.lab.centralised.trainer import PooledTrainer, load_pooled, plan_pooled
from edge_sdk.data.rows import DataConfig, load_data
from edge_sdk.protocol.messages import Stamp
from edge_sdk.runtime.training import TrainingConfig
from tests.coordinator.lab.centralised.centralised_runs import (
    ADAMW,
    SGD,
    make_config,
    plain_lora,
    plain_loss,
    shard_files,
    tokenized,
    train_plainly,
)
from tests.e2e.cluster import WORDS, classified, save_model, sentences
from tests.tiny import CLASSES

# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

OPTIMIZERS = [pytest.param(SGD, id="sgd"), pytest.param(ADAMW, id="adamw")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is tied to its embeddings."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that classifies."""
    return save_model("bert", tmp_path_factory.mktemp("bert"))


def trained(config: ServeConfig, dataset: Any) -> tuple[PooledTrainer, dict[str, np.ndarray]]:
    """All steps of a run without its folder; returns what is trained by name."""
    trainer = PooledTrainer(config, ServerModel(config), dataset)
    for step in range(config.total_steps):
        trainer.train(Stamp(step=step))
    found = dict(trainer.runtime.state.head())
    for name, pair in trainer.runtime.state.adapters.pairs().items():
        found |= {f"{name}.A": pair.a_RI, f"{name}.B": pair.b_OR}
    return trainer, found


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    """The same names, and values that differ by rounding only."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name].detach().numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("training", OPTIMIZERS)
def test_cenlora_is_plain_peft(llama: Path, tmp_path: Path, training: TrainingConfig) -> None:
    """Six steps give the factors of PEFT in a plain loop."""
    config = make_config(llama, tmp_path, training=training)
    examples = tokenized(llama, sentences(1))
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)

    trainer, found = trained(config, examples)
    expected = plain_lora(model, config, trainer.model.facts.targets)
    train_plainly(model, list(expected.values()), config, examples)

    assert_equal(found, expected)
    assert max(np.abs(value).max() for name, value in found.items() if name[-1] == "B") > 1e-3


@pytest.mark.parametrize("trains", ["adapters", "all"])
def test_a_classifier_is_plain_training(bert: Path, tmp_path: Path, trains: Any) -> None:
    """A classifier's head is trained in full beside its adapters, or with everything else."""
    config = make_config(
        bert,
        tmp_path,
        trains=trains,
        task="sequence-classification",
        label_names=WORDS[:CLASSES],
        evaluation=EvaluationConfig(),
    )
    examples = tokenized(bert, classified(1), labels=WORDS[:CLASSES])
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        bert, dtype=torch.float32, num_labels=CLASSES
    )

    trainer, found = trained(config, examples)
    expected: dict[str, Any] = dict(model.named_parameters())
    if trains == "adapters":
        expected = {n: p for n, p in expected.items() if n.startswith("classifier.")}
        expected |= plain_lora(model, config, trainer.model.facts.targets)
    train_plainly(model, list(expected.values()), config, examples)

    assert_equal(found, expected)


@pytest.mark.parametrize("training", OPTIMIZERS)
def test_ft_is_plain_training(llama: Path, tmp_path: Path, training: TrainingConfig) -> None:
    """All weights, tied embeddings included, are those of a plain loop; so are result and loss."""
    config = make_config(llama, tmp_path, trains="all", training=training)
    rows, dev = sentences(1), sentences(9, 10)
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = plain_loss(model, tokenized(llama, dev))

    result = train_pooled(config, rows)
    train_plainly(model, list(model.parameters()), config, tokenized(llama, rows))

    written: Any = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    found = {name: p.detach().numpy() for name, p in written.named_parameters()}
    assert "model.embed_tokens.weight" in found
    assert_equal(found, dict(model.named_parameters()))
    scores = [row["eval"] for row in result.rows]
    assert scores[0]["loss"] == pytest.approx(before, abs=1e-6)
    assert scores[-1]["loss"] == pytest.approx(plain_loss(model, tokenized(llama, dev)), abs=1e-6)
    assert scores[-1]["loss"] < before
    untouched: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert plain_loss(untouched, tokenized(llama, dev)) == pytest.approx(before, abs=1e-12)


def test_files_are_the_devices_shards_together(llama: Path, tmp_path: Path) -> None:
    """Each file is read as a device reads its own, and holds out what the device would."""
    files = shard_files(tmp_path)
    data = DataConfig(validation_fraction=0.25)
    config = make_config(llama, tmp_path, pooled=PooledConfig(files=files, data=data))

    train, held_out = load_pooled(config, ServerModel(config), None)

    expected = [load_data(file, data, 0) for file in files]
    assert [e.where for e in train] == [r.where for rows, _ in expected for r in rows]
    assert [e.where for e in held_out] == [r.where for _, rows in expected for r in rows]
    result = train_pooled(config, durable=False)
    assert all("pooled" in row["eval_by_device"] for row in result.rows)
    assert not list(result.folder.glob("checkpoint-*"))
    assert not (result.folder / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"min_devices": 3}, (24, 8)),
        ({"default": DeviceSettings(batch_size=4), "min_devices": 1}, (4, 4)),
        ({"devices": {"a": DeviceSettings(batch_size=3), "b": DeviceSettings()}}, (11, 1)),
        ({"devices": {"a": DeviceSettings(batch_size=4)}, "min_devices": 2}, (12, 6)),
        ({"pooled": PooledConfig(batch_size=20)}, (20, 5)),
        ({"pooled": PooledConfig(micro_batch=2), "min_devices": 2}, (16, 2)),
    ],
)
def test_a_step_is_as_large_as_those_of_all_devices(
    llama: Path, tmp_path: Path, changes: dict[str, Any], sizes: tuple[int, int]
) -> None:
    """Without sizes of its own it takes the devices', in micro-batches a device could take."""
    config = make_config(llama, tmp_path, **{"pooled": PooledConfig(), **changes})

    plan = plan_pooled(config, ServerModel(config).facts)

    assert (plan.batch_size, plan.micro_batch) == sizes
    assert (plan.split, plan.tail) == (5, True)
