"""A run whose plans are made from what devices measure."""

from __future__ import annotations

from pathlib import Path

from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.engine.server_model import ServerModel
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.kept.part_cache import PartCache
from tests.coordinator.rounds.test_any_message import PLANNING
from tests.e2e.cluster import save_model


def planned(folder: Path, min_devices: int) -> tuple[ServeConfig, ServerModel]:
    """Return its configuration and model; nobody else uses *folder*."""
    config = ServeConfig(
        model=str(save_model("gpt2", folder)),
        secret_key=folder / "none.key",
        allow_list=folder / "none.yaml",
        min_devices=min_devices,
        default=DeviceSettings(batch_size=2, codec="float32"),
        planning=PLANNING,
        lora=LoraConfig(r=2, target_modules=("mlp.c_proj",)),
        device="cpu",
    )
    return config, ServerModel(config, PartCache(folder / "parts"))
