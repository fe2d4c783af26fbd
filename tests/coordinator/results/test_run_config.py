"""A run that goes on computes what it was begun with, whatever is new since."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config.run import ServeConfig
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import CONFIG
from edge_sdk.config.describe import dump_config
from edge_sdk.lora.targets import LoraConfig


@pytest.mark.parametrize("experts", [True, False])
def test_a_run_of_a_version_without_adapted_experts_goes_on_without(
    tmp_path: Path, experts: bool
) -> None:
    """Its checkpoints have none; one that says what it wants keeps it, and so does an override."""
    text = dump_config(ServeConfig(model="m", lora=LoraConfig(r=3, experts=experts)))
    older = "".join(line for line in text.splitlines(True) if "experts:" not in line)
    assert older != text

    (tmp_path / CONFIG).write_text(text)
    assert read_config(tmp_path).lora == LoraConfig(r=3, experts=experts)
    (tmp_path / CONFIG).write_text(older)
    assert read_config(tmp_path).lora == LoraConfig(r=3, experts=False)
    assert read_config(tmp_path, ["lora.experts=true"]).lora.experts
