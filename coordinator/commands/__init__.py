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
    "looking",
    "parser",
    "plan",
    "presets",
    "readiness",
    "serve",
    "simulate",
    "steer",
    "terminal",
]
