"""A run that ends leaves its report; one that cannot be written changes nothing of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.config.run import ServeConfig
from coordinator.report.write import write_report
from coordinator.results.events.event import RunEvent, Watcher
from coordinator.results.events.reporting import ReportFailed, ReportWritten
from coordinator.results.events.run import RunFinished
from coordinator.results.lifecycle import COMPLETED, STOPPED
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import RunFiles, Watchers
from edge_sdk.errors import public_text


class _Ending:
    """Remembers how a run ended."""

    outcome = ""

    def see(self, event: RunEvent) -> None:
        """Take notice of the end."""
        if isinstance(event, RunFinished):
            self.outcome = event.outcome


@contextmanager
def report_at_end(config: ServeConfig, folder: RunFolder, watcher: Watcher) -> Iterator[Watcher]:
    """Yield what shows events to *watcher*; when the run has its result, write the report."""
    ending = _Ending()
    yield Watchers([watcher, ending])
    if not config.report or ending.outcome not in (COMPLETED, STOPPED):
        return
    try:
        watcher.see(ReportWritten(write_report(folder, config)))
    except Exception as error:  # noqa: BLE001 - a run that has its result is not to end with this
        reason = public_text(f"{type(error).__name__}: {error}")
        Watchers([RunFiles(folder), watcher]).see(ReportFailed(reason))
