"""A run of a model whose blocks need more than a hidden state, over real sockets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.nn import functional as F

from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.engine.interface import Job
from coordinator.engine.local import LocalEngine
from coordinator.engine.server_model import ServerModel
from coordinator.export.run import export_run
from coordinator.results.run_folder import CONFIG
from edge_sdk.config.describe import dump_config
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ModelError
from edge_sdk.model.layout import auto_class
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import Cluster, save_model, sentences, wait_all, write_rows
from tests.families import BLOCKS

ROWS = sentences(7, count=4)


@pytest.fixture(scope="module", params=["mistral3", "gemma4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composite model; one whose blocks read the ids, and keys that others have kept."""
    return save_model(request.param, tmp_path_factory.mktemp(request.param))


def peft_loss(model: ServerModel, adapter: Path) -> float:
    """The loss of the base with an exported adapter, called as anybody would call it."""
    factory = auto_class(model.source.config, "causal-lm")
    base = factory.from_pretrained(model.source.folder, dtype=torch.float32)
    loaded: Any = peft.PeftModel.from_pretrained(base, adapter).eval()
    loss_sum, targets = 0.0, 0
    for micro in model.eval_batches:
        ids_BT, lengths_B, labels_BT = (torch.from_numpy(x).long() for x in micro[:3])
        mask_BT = (torch.arange(ids_BT.shape[1])[None] < lengths_B[:, None]).long()
        with torch.no_grad():
            logits_BTV = loaded(input_ids=ids_BT, attention_mask=mask_BT).logits
        flat = logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
        loss_sum += float(F.cross_entropy(*flat, reduction="sum"))
        targets += micro.num_targets
    return loss_sum / targets


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_run_is_what_peft_computes(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    """Cut devices, whole ones and the coordinator agree, and PEFT reads the result back."""
    cluster.model = folder
    shard = write_rows(cluster.folder / "dev.jsonl", ROWS)
    config = cluster.config(
        rounds=2,
        steps_per_round=2,
        default=DeviceSettings(split=1, batch_size=len(ROWS), micro_batch=2, codec="float32"),
        devices={"b": DeviceSettings(split=BLOCKS)},
        training=TrainingConfig(learning_rate=1e-2),
        evaluation=EvaluationConfig(data=DataConfig(path=str(shard))),
    )
    serving = cluster.serve(config).start()
    held = DataConfig(validation_fraction=0.25)
    clients = [cluster.client(n, sentences(ord(n)), data=held).start() for n in "abc"]
    assert serving.wait() == "completed"
    wait_all(clients)

    first, last = (serving.rows[i]["eval"]["loss"] for i in (0, -1))
    serving.folder.write_text(CONFIG, dump_config(config))
    export_run(serving.folder, tmp_path / "adapter")
    found = peft_loss(serving.model, tmp_path / "adapter")

    assert last != first
    assert found == pytest.approx(last, rel=1e-5)


def test_labels_that_stay_on_devices_keep_the_ids_there(cluster: Cluster, tmp_path: Path) -> None:
    """Before anything starts the run is refused in one line that says what to set."""
    cluster.model = save_model("gemma4", tmp_path / "model")
    own = DeviceSettings(split=1, batch_size=4, codec="float32")

    with pytest.raises(ModelError, match="labels: server") as caught:
        cluster.serve(cluster.config(labels="device", default=own))

    assert "\n" not in str(caught.value)


def test_rows_of_all_devices_bring_their_own_ids(cluster: Cluster, tmp_path: Path) -> None:
    """A wave of devices with texts of unequal length computes what each of them does alone."""
    cluster.model = save_model("gemma4", tmp_path / "model")
    own = DeviceSettings(split=1, batch_size=2, codec="float32")
    model = ServerModel(cluster.config(default=own))
    engine = model.planned_engine()
    assert isinstance(engine, LocalEngine)
    generator = np.random.default_rng(0)

    def job(name: str, longest: int) -> Job:
        ids = generator.integers(3, 90, (2, longest)).astype(np.int32)
        hidden = generator.normal(size=(2, longest, model.facts.layout.width)).astype(np.float32)
        lengths = np.array([longest, longest - 1], np.int32)
        return Job(name, 1, 2.0, 2 * longest - 3, hidden, lengths, ids, ids)

    jobs = [job("a", 5), job("b", 8)]
    together = {answer.device: answer for answer in engine.train(jobs, 0, 0)}

    for own_job in jobs:
        (alone,) = engine.train([own_job], 0, 0)
        assert together[own_job.device].sums == pytest.approx(alone.sums, rel=1e-5)
        np.testing.assert_allclose(
            together[own_job.device].grad_BTD, alone.grad_BTD, rtol=1e-4, atol=1e-6
        )
