"""A file for each command of `coordinator`."""

__all__ = [
    "audit_privacy",
    "check",
    "compare",
    "deployment",
    "devices",
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
