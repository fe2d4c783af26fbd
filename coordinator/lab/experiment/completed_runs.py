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
COMPLETED, INTERRUPTED, NOT_RUN = "completed", "interrupted", "not run"
# Until a run has ended, so that its folder is known as ours even if we are killed.
UNFINISHED = "unfinished"


def digest(config: ExperimentConfig) -> str:
    """Equal for runs that are configured alike and read the same bytes of data.

    Args:
        config: Of one run. Which other methods and seeds there are makes no difference to it.
    """
    section = replace(config.experiment, presets=(), methods={}, seeds=(), target=None)
    own = replace(config, name=None, runs=Path(), experiment=section)
    files = (board.data for board in config.boards.values())
    return digest_of(own, (section.data.path, config.evaluation.data.path, *files))


def is_complete(folder: Path, config: ExperimentConfig) -> bool:
    """Whether *folder* holds the run of *config*, from beginning to end."""
    facts = _facts(folder)
    return facts.get("outcome") == COMPLETED and facts.get("digest") == digest(config)


def refuse_foreign(folder: Path) -> None:
    """Find out before anything is started whether *folder* may be written anew.

    Raises:
        ConfigError: there is something that is not a run of an experiment.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / FACTS).is_file()):
        raise ConfigError(
            f"{folder} is in the way and is not a run of an experiment (it has no {FACTS}): "
            "move it, or choose another --out"
        )


def make_room(folder: Path) -> None:
    """Remove a former run.

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
