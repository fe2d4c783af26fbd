"""What a run without a barrier has learned: dW, and the buffer of what is to be merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from coordinator.aggregation.buffer import BufferedUpdate, Merging, UpdateBuffer
from coordinator.aggregation.ledger import Report, RoundResult
from coordinator.aggregation.rules import SERVER
from coordinator.aggregation.screening import Diverged, Moves, Refusals
from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.planning.interface import InForce
from coordinator.rounds.global_model import GlobalModel
from edge_sdk.errors import NumericError
from edge_sdk.runtime.interface import TailSums


class Merged(NamedTuple):
    """What has come of a merge."""

    result: RoundResult
    evaluated: TailSums | None
    """Loss on the coordinator's own file, where that was due."""
    reports: dict[str, Report]
    """The newest report of each device that was in it, and the coordinator's own."""
    updates: dict[str, list[int]]
    """Merges that each update had missed, by device."""
    samples: int
    """Samples of the updates."""
    served: int
    """Samples that the coordinator's blocks have learned from since the merge before."""


class BufferedModel(GlobalModel):
    """The run's dW and head, and the updates that came since the last merge."""

    def __init__(self, config: ServeConfig, model: ServerModel, planner: InForce) -> None:
        super().__init__(config, model, planner)
        self.buffer = UpdateBuffer()
        self._merging = Merging(model.facts, config.lora, config.buffered.staleness_power)
        self._moves: dict[str, Moves] = {}
        """How far the newest update of each device went."""
        self._heads = {0: self._head()}
        """Trained heads by version, as far back as tours may begin."""

    def take(
        self, device: str, version: int, report: Report, *, is_retry: bool = False
    ) -> Refusals:
        """Put what a device has learned since *version* into the buffer, if nothing is wrong.

        Raises:
            Diverged: it is beyond all measure, and the device is not to blame.
        """
        before = self.ledger.pairs[device]
        head = self._heads.get(version, {})
        brought = self.screening.brought(report, version, before, head)
        others = {name: moves for name, moves in self._moves.items() if name != device}
        refused = self.screening.screen({device: brought}, is_retry=is_retry, known=others)
        if not refused.devices:
            self._moves[device] = self.screening.moves(brought)
            self.buffer.updates.append(BufferedUpdate(device, version, before, report))
            self.ledger.pairs[device] = dict(report.pairs)
        return refused

    def merge(self, version: int, *, evaluates: bool) -> Merged:
        """Join what has come since the last merge; the coordinator's blocks then hold that, too.

        Args:
            version: Merges done so far.
            evaluates: Whether what has come of it is evaluated.

        Raises:
            Diverged: nothing good comes of it, and no device is to blame; nothing was changed.
        """
        self._check_own()
        buffer, server = self.buffer, Report(0, 0, *self.engine.learned())
        try:
            result = self._merging.merge(buffer, self.ledger, server, version)
        except NumericError as error:
            raise Diverged(f"the merge: {error}") from error
        self.buffer = UpdateBuffer()
        self._take(result)
        oldest = version + 1 - self._config.buffered.max_staleness
        self._heads = {v: head for v, head in self._heads.items() if v >= oldest}
        self._heads[version + 1] = result.head or self._heads.get(version, {})
        newest = {update.device: update.report for update in buffer.updates}
        return Merged(
            result,
            self.evaluate(version + 1) if evaluates else None,
            {**newest, SERVER: server},
            buffer.staleness(version),
            buffer.samples,
            int(sum(buffer.served.values())),
        )

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Return everything that a restart needs."""
        return {**super().state(), "buffer": self.buffer.state()}

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take over what `state` returned, with an engine like the one at that time."""
        super().load_state(state)
        self.buffer = UpdateBuffer.of_state(state["buffer"])
        self._moves, self._heads = {}, {}  # of tours that began before, heads are not known
