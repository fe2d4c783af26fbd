"""The config of a run, as its folder keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.results.run_folder import CONFIG
from edge_sdk.config.loader import load_config
from edge_sdk.config.sources import Entries, read_file


def read_config(path: Path, overrides: Iterable[str] = ()) -> ServeConfig:
    """Return the config of the run at *path*, with *overrides*.

    A run of a version that knew no adapters on experts goes on without them: its checkpoints have
    none.
    """
    written = read_file(path / CONFIG)
    lora = written.entries.get("lora") if isinstance(written, Entries) else None
    knows_experts = isinstance(lora, Entries) and "experts" in lora.entries
    without = [] if knows_experts else ["lora.experts=false"]
    return load_config(ServeConfig, path / CONFIG, [*without, *overrides], env={})
