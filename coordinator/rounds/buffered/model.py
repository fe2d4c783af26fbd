"""What a run without a barrier has learned: dW, and the buffer of what is to be merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from coordinator.aggregation.buffer import BufferedUpdate, Merging, UpdateBuffer
from coordinator.aggregation.ledger import Report, RoundResult
from coordinator.aggregation.limits import oversized
from coordinator.aggregation.rules import SERVER
from coordinator.config.run import ServeConfig
from coordinator.engine.interface import DeviceFault
from coordinator.engine.server_model import ServerModel
from coordinator.planning.interface import Planning
from coordinator.rounds.global_model import GlobalModel
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

    def __init__(self, config: ServeConfig, model: ServerModel, planner: Planning) -> None:
        super().__init__(config, model, planner)
        self.buffer = UpdateBuffer()
        self._merging = Merging(model.facts, config.lora, config.buffered.staleness_power)

    def take(self, device: str, version: int, report: Report) -> None:
        """Put what a device has learned since *version* into the buffer.

        Raises:
            DeviceFault: nobody can have learned that.
        """
        for name, why in oversized({device: report}).items():
            raise DeviceFault(name, why)
        before = self.ledger.pairs[device]
        self.buffer.updates.append(BufferedUpdate(device, version, before, report))
        self.ledger.pairs[device] = dict(report.pairs)

    def merge(self, version: int) -> Merged:
        """Join what has come since the last merge; the coordinator's blocks then hold that, too.

        Args:
            version: Merges done so far.

        Raises:
            NumericError: nothing finite comes of it.
        """
        buffer, server = self.buffer, Report(0, 0, *self.engine.learned())
        result = self._merging.merge(buffer, self.ledger, server, version)
        self.buffer = UpdateBuffer()
        self.engine.take(result.changes_for(SERVER), {}, result.head)
        newest = {update.device: update.report for update in buffer.updates}
        return Merged(
            result,
            self.evaluate(version + 1),
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
