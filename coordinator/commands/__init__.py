"""A file for each command of `coordinator`."""

__all__ = [
    "audit_privacy",
    "check",
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
