"""A file for each command of `coordinator`.

Other packages import the modules that are named here, and no other.
"""

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
