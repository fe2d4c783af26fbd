"""What is asked of an export: all that decides what comes out. Knows no torch and no ONNX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdk.model.layout import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What to export."""

    task: Task
    num_labels: int
    split: int
    """Blocks 0 .. split-1."""
    tail: bool
    """Whether the tail is wanted too."""
    measures: bool
    """Whether the device measures importance."""
    targets: Mapping[str, tuple[int, ...]]
    """(outputs, inputs) of each weight that may have an adapter, by module name."""
    dtypes: Mapping[str, str]
    """What each tensor of the slice is stored as, as torch calls it, by whole-model name."""


def load_job(path: Path) -> ExportJob:
    """Read what `job_text` has made."""
    return ExportJob(**json.loads(path.read_text(encoding="utf-8")))


def job_text(job: ExportJob) -> str:
    """Return *job* as text, the same for equal jobs."""
    return json.dumps(asdict(job), sort_keys=True)
