"""The runs of an experiment: each method in each power mode with each seed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.lab.experiment.config import (
    BoardConfig,
    ExperimentConfig,
    cores,
    watts,
)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run."""

    label: str
    """Name of its folder: METHOD, and where there are some -MODE and -SEED."""
    method: str
    mode: str | None
    """Power mode that boards are brought into; None: as they are."""
    config: ExperimentConfig

    @property
    def row(self) -> str:
        """The method as rows and curves call it: in two power modes it is two."""
        return self.method if self.mode is None else f"{self.method}, {self.mode}"


def planned_runs(methods: Mapping[str, ExperimentConfig], out: Path) -> list[PlannedRun]:
    """Return the runs in their order; their folders lie in *out*."""
    runs = []
    for method, config in methods.items():
        section = config.experiment
        for mode in section.power_modes or (None,):
            own = config if mode is None else in_mode(config, mode)
            for seed in section.seeds or (config.training.seed,):
                ends = (mode, seed if section.seeds else None)
                label = "-".join([method, *(str(end) for end in ends if end is not None)])
                training = replace(own.training, seed=seed)
                run = replace(own, training=training, runs=out, name=label)
                runs.append(PlannedRun(label, method, mode, run))
    return runs


def in_mode(config: ExperimentConfig, name: str) -> ExperimentConfig:
    """Return the experiment in one of its power modes, which says nothing of the others."""
    mode, quotas = config.experiment.power_modes[name], cores(config)

    def changed(board: str, own: BoardConfig) -> BoardConfig:
        if own.ssh is not None:
            return replace(own, power_commands={name: own.power_commands[name]})
        power = watts(config, board) * mode.power
        return replace(own, cpu_quota=quotas[board] * mode.speed, watts=power)

    boards = {board: changed(board, own) for board, own in config.boards.items()}
    section = replace(config.experiment, power_modes={name: mode})
    return replace(config, boards=boards, experiment=section)
