"""What `report_to` and the report cost: CPU of the run's own thread for an event, and of a report.

    python benchmarks/reporting.py                  # events
    python benchmarks/reporting.py runs/first       # and the report of a run

Events are steps of three devices, told to the table `csv`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.report.write import write_report
from coordinator.results.events.rounds import StepDone
from coordinator.results.lifecycle import read_run
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from coordinator.tracking.reporting import reporting
from edge_sdk.protocol.messages import Stamp, StepReport

STEPS = 3000


def main(arguments: Sequence[str]) -> None:
    """Measure, and print."""
    config = ServeConfig(model="m", rounds=10, steps_per_round=100, report_to=("csv",))
    with tempfile.TemporaryDirectory() as folder:
        with reporting(config, RunFolder(Path(folder)), Watchers()) as watcher:
            events = [_step(number) for number in range(STEPS)]
            began_s = time.thread_time()
            for event in events:
                watcher.see(event)
            spent_s = time.thread_time() - began_s
        lines = (Path(folder) / "trackers" / "numbers.csv").read_text().count("\n")
    each = 1e6 * spent_s / STEPS
    print(f"an event costs the run's thread {each:.1f} us; {lines - 1:,} numbers were written")
    for path in arguments:
        run, settings = read_run(Path(path), [])
        write_report(run, settings, Path(tempfile.gettempdir()) / "report.html")  # imports
        began_s = time.process_time()
        write_report(run, settings, Path(tempfile.gettempdir()) / "report.html")
        print(f"the report of {path}: {1e3 * (time.process_time() - began_s):.0f} ms of CPU")


def _step(number: int) -> StepDone:
    device = f"device-{number % 3}"
    stamp = Stamp(run="r", device=device, step=number // 3)
    report = StepReport(
        stamp=stamp,
        loss=1.0,
        num_targets=1,
        num_sequences=1,
        num_tokens=100,
        compute_s=0.1,
        wait_s=0.1,
        peak_bytes=1,
    )
    return StepDone(device, report, 1000, (number, number), {"power": 1.0})


if __name__ == "__main__":
    main(sys.argv[1:])
