"""A device's part in a run, from its configuration to its checkpoints.

Other packages import the modules that are named here, and no other.
"""

__all__ = [
    "backends",
    "callbacks",
    "checkpoints",
    "client",
    "config",
    "incoming",
    "link_speed",
    "participant",
    "profile",
    "setup",
]
