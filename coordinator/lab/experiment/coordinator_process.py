"""The coordinator of an experiment as a program of its own, which tells on stdout what happens.

    python -m coordinator.lab.experiment.coordinator_process CONFIG MIN_DEVICES

It is `coordinator serve` with two differences: the lines are JSON, and `min_devices` of the config
counts for the start only: afterwards the run goes on with MIN_DEVICES.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.config.presets import load_serve_config
from coordinator.rounds.executor import COMPLETED
from coordinator.rounds.launch import serve
from coordinator.rounds.run import Run
from edge_sdk.command import quiet_libraries
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, EdgeError, PeerGone, one_line
from edge_sdk.protocol.messages import StepReport


class JsonWatcher:
    """A `Watcher` that writes a line of JSON for everything."""

    def __init__(self, min_devices: int) -> None:
        self._min_devices = min_devices
        self.run: Run | None = None

    def attend(self, run: Run) -> None:
        """Know the run that is told about."""
        self.run = run

    def say(self, **what: Any) -> None:
        """Write a line; `time` is the machine's clock, `cpu_s` what we have computed so far."""
        what |= {"time": time.time(), "cpu_s": time.process_time()}
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say it."""
        address = None if self.run is None else self.run.gateway.address
        self.say(note=text, address=address)

    def device(self, name: str, text: str) -> None:
        """Say it."""
        self.say(device=name, text=text)

    def begin_round(self) -> None:
        """Say it: with the first one the clock begins."""
        self.say(begins=True, energy_j=self._energy_j())

    def step(self, device: str, report: StepReport, end_step: int) -> None:
        """Say it; with the first one the run has begun with everybody."""
        if self.run is not None:
            self.run.state.min_devices = self._min_devices
        self.say(
            device=device,
            step=report.stamp.step + 1,
            loss=report.loss,
            tokens=report.num_tokens,
            compute_s=report.compute_s,
            wait_s=report.wait_s,
            peak_bytes=report.peak_bytes,
        )

    def traffic(self, device: str, bytes_up: int, bytes_down: int) -> None:
        """Nothing: telemetry.jsonl has it."""

    def row(self, row: dict[str, Any]) -> None:
        """Say it, and how much energy each board has measured by its last sign of life."""
        self.say(row=row, energy_j=self._energy_j())

    def _energy_j(self) -> dict[str, float]:
        assert self.run is not None, "rows are the run's"
        gateway, found = self.run.gateway, {}
        for name in gateway.devices():
            with contextlib.suppress(PeerGone, KeyError):
                found[name] = gateway.stats(name).telemetry["energy"]
        return found


def main(arguments: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    quiet_libraries()
    watcher = JsonWatcher(int(arguments[1]))
    try:
        config = load_serve_config(Path(arguments[0]), env={})
        outcome = serve(config, watcher, watcher.attend)
    except EdgeError as error:
        watcher.say(error=one_line(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return 0 if outcome == COMPLETED else INTERRUPTED_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
