"""A file for each command of `coordinator`."""

__all__ = [
    "audit_privacy",
    "check",
    "client",
    "compare",
    "examples",
    "experiment",
    "export",
    "init",
    "plan",
    "presets",
    "readiness",
    "serve",
    "simulate",
    "status",
    "terminal",
]
