"""The coordinator: plans, runs the rest of the model, aggregates, stores, exports.

What is named here is the API; everything else may change.
"""

from typing import TYPE_CHECKING

from profiler.door import lazy_door

if TYPE_CHECKING:
    from coordinator.config.run import ServeConfig
    from coordinator.export.options import ExportOptions
    from coordinator.export.run import export_run
    from coordinator.rounds.launch import resume, serve

__all__ = ["export_run", "ExportOptions", "resume", "serve", "ServeConfig"]

_HOMES = {
    "export_run": "export.run",
    "ExportOptions": "export.options",
    "resume": "rounds.launch",
    "serve": "rounds.launch",
    "ServeConfig": "config.run",
}

__getattr__, __dir__ = lazy_door(__name__, _HOMES)
