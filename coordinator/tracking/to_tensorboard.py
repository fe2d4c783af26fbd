"""Numbers as TensorBoard's event files: the run is one of its runs, each device another.

Equal tags of several runs are one chart there, with a line for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.tracking.names import Moment, TrackedRun

FOLDER = "tensorboard"


class TensorBoardFiles:
    """Writes event files below the run's folder."""

    takes_live = False

    def open(self, about: TrackedRun) -> None:
        """Begin files; those of a run that goes on stand beside the old ones."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._make = about.folder / FOLDER, SummaryWriter
        self._writers: dict[str | None, Any] = {}
        facts = "\n".join(f"    {key}: {value}" for key, value in about.facts.items())
        self._of(None).add_text("config", facts)

    def take(self, samples: Sequence[Moment]) -> None:
        """Write a scalar for each number."""
        for sample in samples:
            for name, value, device in sample.numbers:
                self._of(device).add_scalar(name, value, sample.step, walltime=sample.time_s)
        for writer in self._writers.values():
            writer.flush()

    def close(self, *, completed: bool) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()

    def abandon(self) -> None:
        """Do nothing: none of its threads keeps a program."""

    def _of(self, device: str | None) -> Any:
        if device not in self._writers:
            name = "run" if device is None else f"device-{device}"
            self._writers[device] = self._make(str(self._folder / name))
        return self._writers[device]
