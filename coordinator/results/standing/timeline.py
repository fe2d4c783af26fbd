"""The latest steps and computations of a run, by their ends: who computed, who waited, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from coordinator.results.events.rounds import StepDone
from coordinator.results.standing.observed import Computed

# So many of each are kept: about 30 kB in the file, a step or two of 200 devices.
MOST = 600


class Timeline:
    """Keeps the latest steps of devices, and what the coordinator has computed lately."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Any, ...]] = deque(maxlen=MOST)
        self._computed: deque[tuple[Any, ...]] = deque(maxlen=MOST)

    def step(self, event: StepDone, now_s: float) -> None:
        """Note the step of a device, which has ended at *now_s*."""
        report = event.report
        spent = round(report.compute_s, 4), round(report.wait_s, 4)
        row = (event.device, round(now_s, 3), *spent, report.stamp.step + 1, round(report.loss, 4))
        self._steps.append(row)

    def computed(self, event: Computed, now_s: float) -> None:
        """Note what the coordinator has computed until *now_s*."""
        row = event.what, round(now_s, 3), round(event.seconds, 4), list(event.devices)
        self._computed.append(row)

    def facts(self) -> Mapping[str, Any]:
        """Return it for a file: rows as they are described in docs/page.md."""
        return {"steps": list(self._steps), "computed": list(self._computed)}
