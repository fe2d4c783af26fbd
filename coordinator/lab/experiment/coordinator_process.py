"""The coordinator of an experiment as a program of its own, which reports on stdout.

    python -m coordinator.lab.experiment.coordinator_process CONFIG MIN_DEVICES

It is `coordinator serve` with two differences: its lines are JSON, and `min_devices` of the config
counts for the start only; afterwards the run goes on with MIN_DEVICES.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.config.presets import load_serve_config
from coordinator.page.beside import page_beside
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundDone, RoundStarted, StepDone
from coordinator.results.events.run import Listening
from coordinator.results.lifecycle import COMPLETED
from coordinator.results.standing.live_file import LiveFile
from coordinator.results.watchers import Watchers
from coordinator.rounds.launch import serve
from edge_sdk.command import quiet_libraries
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, EdgeError, one_line
from edge_sdk.protocol.messages import StepReport


class JsonWatcher:
    """Writes a line of JSON for what it sees; telemetry.jsonl has the rest."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def say(self, **what: Any) -> None:
        """Write a line; `time` is the machine's clock, `cpu_s` our CPU time so far.

        The clock is read once: differences of two lines are right although it may be set meanwhile.
        """
        what |= {"time": self._offset_s + time.monotonic(), "cpu_s": time.process_time()}
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def see(self, event: RunEvent) -> None:
        """Say it; the first round starts the clock."""
        if isinstance(event, RoundStarted):
            self.say(begins=True, energy_j=_energy_j(event.boards))
        elif isinstance(event, RoundDone):
            self.say(row=event.row, energy_j=_energy_j(event.boards))
        elif isinstance(event, StepDone):
            self._step(event.device, event.report)
        elif isinstance(event, Listening):
            self.say(note=event.text, address=event.address)
        else:
            for line in event.text.splitlines():
                self.say(note=line)

    def _step(self, device: str, report: StepReport) -> None:
        self.say(
            device=device,
            step=report.stamp.step + 1,
            loss=report.loss,
            tokens=report.num_tokens,
            compute_s=report.compute_s,
            wait_s=report.wait_s,
            peak_bytes=report.peak_bytes,
        )


def _energy_j(boards: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the energy that each board had measured at its last sign of life."""
    return {name: board["energy"] for name, board in boards.items() if "energy" in board}


def main(arguments: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    quiet_libraries()
    watcher = JsonWatcher()
    try:
        config = load_serve_config(Path(arguments[0]), env={})
        with page_beside(config.page, config.page_token, watcher) as shown:
            outcome = serve(config, Watchers([shown, LiveFile()]), int(arguments[1]))
    except EdgeError as error:
        watcher.say(error=one_line(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return 0 if outcome == COMPLETED else INTERRUPTED_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
