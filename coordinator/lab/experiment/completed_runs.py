"""Which runs of an experiment are there already, and what may be removed for another one.

A run's folder is ours if it holds `boards.json`, which also says how the run was configured: one
with another model, other data or other boards is not the same run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator.lab.experiment.config import ExperimentConfig
from coordinator.results.run_folder import digest_of
from edge_sdk.errors import ConfigError
from edge_sdk.files import storage_errors

FACTS = "boards.json"
# Beside it: what had been used after each round, and what happened to boards.
MARKS, HAPPENINGS = "marks.jsonl", "happenings.jsonl"
COMPLETED, INTERRUPTED, NOT_RUN = "completed", "interrupted", "not run"
# Outcome until a run has ended, so that its folder is known as ours even if we are killed.
UNFINISHED = "unfinished"


def digest(config: ExperimentConfig) -> str:
    """Return a digest that is equal for runs with the same configuration and the same data.

    Args:
        config: Configuration of one run; other methods and seeds make no difference.
    """
    section = replace(config.experiment, presets=(), methods={}, seeds=(), target=None)
    own = replace(config.unwatched(), name=None, runs=Path(), experiment=section)
    files = (board.data for board in config.boards.values())
    return digest_of(own, (section.data.path, config.evaluation.data.path, *files))


def is_complete(folder: Path, config: ExperimentConfig) -> bool:
    """Return whether *folder* holds the whole run of *config*."""
    facts = _facts(folder)
    return facts.get("outcome") == COMPLETED and facts.get("digest") == digest(config)


def seconds_of(folder: Path) -> float:
    """Return how long the whole run in *folder* took, in seconds."""
    return float(_facts(folder).get("seconds", 0.0))


def refuse_foreign(folder: Path) -> None:
    """Refuse a *folder* that must not be replaced, before anything is started.

    Raises:
        ConfigError: it holds something that is not a run of an experiment.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / FACTS).is_file()):
        raise ConfigError(
            f"{folder} is in the way and is not a run of an experiment (it has no {FACTS}): "
            "move it, or choose another --out"
        )


def make_room(folder: Path) -> None:
    """Remove a former run, if *folder* holds one.

    Raises:
        ConfigError: as `refuse_foreign`.
        StorageError: it cannot be removed.
    """
    refuse_foreign(folder)
    if folder.exists():
        with storage_errors(folder):
            shutil.rmtree(folder)


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
