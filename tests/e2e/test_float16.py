"""A run in float16 of a model whose hidden states are larger than float16's largest number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.config.run import DeviceSettings
from edge_sdk.model.layout import find_layout
from tests.e2e.cluster import Cluster, save_model, wait_all
from tests.tiny import make_config, make_model

SPLIT = 2


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model in whose second block hidden states grow beyond 65,504."""
    folder = save_model("llama", tmp_path_factory.mktemp("wide"))
    model: Any = make_model(make_config("llama"), "causal-lm")
    path = find_layout(model.config, "causal-lm").blocks_path
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            weight = model.get_parameter(f"{path}.{SPLIT - 1}.mlp.{name}.weight")
            weight *= 1e5
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_run_in_float16_completes(
    cluster: Cluster, wide: Path, labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In products and on the wire, on both sides: nobody is blamed, and what was done is said."""
    cluster.model = wide
    config = cluster.config(
        labels=labels,
        compute="float16",
        rounds=1,
        steps_per_round=2,
        default=DeviceSettings(split=SPLIT, batch_size=4, codec="float16"),
    )
    serving = cluster.serve(config).start()
    clients = [*cluster.start("a", compute="float16"), *cluster.start("b", "c")]

    assert serving.wait() == "completed"

    wait_all(clients)
    assert serving.rows[-1]["train_loss"] > 0
    assert f"float16.overflow block={SPLIT - 1} " in caplog.text
    assert f"what=hidden states after block {SPLIT - 1} " in caplog.text
