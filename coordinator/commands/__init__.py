"""A file for each command of `coordinator`."""

__all__ = [
    "audit_privacy",
    "check",
    "client",
    "compare",
    "deployment",
    "examples",
    "experiment",
    "export",
    "init",
    "parser",
    "plan",
    "presets",
    "readiness",
    "serve",
    "simulate",
    "status",
    "steer",
    "terminal",
]
