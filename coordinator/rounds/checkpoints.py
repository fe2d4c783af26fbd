"""How a run is saved and brought back, in this process or in another one.

What is slow is done by whoever calls for it: the event loop hands it to the compute thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Protocol

import numpy as np

from coordinator.results.lifecycle import IMPORTANCE, METRICS, PLANS, TELEMETRY, take_up
from coordinator.results.run_folder import SAMPLES, Checkpoint, RunFolder
from coordinator.rounds.plans.desk import PlanningDesk
from coordinator.rounds.run import Run
from coordinator.steering.early_stopping import EarlyStopping


class SavedModel(Protocol):
    """What a run has learned, as far as it is saved."""

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Return everything that a restart needs."""

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take over what `state` returned."""


class Checkpoints:
    """The checkpoints in a run's folder."""

    def __init__(
        self,
        folder: RunFolder,
        keep: int,
        run: Run,
        learned: SavedModel,
        planner: PlanningDesk,
        early: EarlyStopping,
    ) -> None:
        self._folder, self._keep, self.early = folder, keep, early
        self._run, self._learned, self._planner = run, learned, planner

    def __bool__(self) -> bool:
        return bool(self._folder.checkpoints())

    def moment(self, *, goes_on: bool = False) -> Callable[[], None]:
        """Return what writes a checkpoint of this very moment; any thread may call it.

        Until it has returned nothing may be computed; devices may come and go. It raises
        StorageError.

        Args:
            goes_on: Whether devices go on with what they have sent of the step.
        """
        step = self._run.state.step
        facts, planner = deepcopy(self._run.facts()), self._planner.copy()
        write_held = self._run.residuals.commit(step, goes_on=goes_on)
        spared = self._spared()

        def write() -> None:
            state = {**facts, "planner": planner.state()}
            found = Checkpoint(state, self._learned.state())
            self._folder.save_checkpoint(step, found, self._keep, spared)
            write_held()

        return write

    def _spared(self) -> list[int]:
        """Return the steps of models that are the best so far, or may yet turn out to be."""
        if not self.early.config.is_on:
            return []
        state, row = self._run.state, self._run.reporting.pending
        found = {self.early.verdict().best_round, None if row is None else row["round"]}
        return [n * state.steps_per_round for n in found if n is not None]

    def newest(self) -> Checkpoint:
        """Read the newest checkpoint that is whole, and let what was learned be as it was then."""
        checkpoint = self._folder.load_checkpoint()
        self._learned.load_state(checkpoint.arrays)
        return checkpoint

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Let the run stand where the newest checkpoint found it; rows after it are dropped.

        What was planned then, `PlanChanges` brings back.
        """
        self._restore(checkpoint, in_new_process=False)
        if checkpoint.damaged:  # back beyond rows that were complete
            self._run.reporting.restore_row(checkpoint.state["row"])
            self._drop_rows(checkpoint)

    def _restore(self, checkpoint: Checkpoint, *, in_new_process: bool) -> None:
        self._run.restore(checkpoint.state, in_new_process=in_new_process)
        take_up(self._folder, checkpoint, self._run.watcher)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from *checkpoint* in a new process: rows written after it are dropped."""
        done, row = checkpoint.state["round"], checkpoint.state["row"]
        if done and self.early.ends_at(done, row) is not None:
            self._run.total_rounds = done
        self._planner.load_state(checkpoint.state["planner"])
        self._learned.load_state(checkpoint.arrays)
        self._restore(checkpoint, in_new_process=True)
        self._drop_rows(checkpoint)

    def _drop_rows(self, checkpoint: Checkpoint) -> None:
        done = self._run.state.round
        has_row = checkpoint.state["row"] is not None
        self._folder.drop_rows_from(METRICS, done if has_row else done + 1)
        self._folder.drop_rows_from(TELEMETRY, done)
        self._folder.drop_rows_from(PLANS, done + 1)
        self._folder.drop_rows_from(SAMPLES, done + 1)
        self._folder.drop_rows_from(IMPORTANCE, done + 1)
