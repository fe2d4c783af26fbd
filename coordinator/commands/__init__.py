"""A file for each command of `coordinator`."""

__all__ = [
    "client",
    "compare",
    "experiment",
    "export",
    "plan",
    "presets",
    "serve",
    "simulate",
    "status",
]
