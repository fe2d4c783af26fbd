"""A device's part in a run, from its configuration to its checkpoints."""

__all__ = [
    "backends",
    "callbacks",
    "checkpoints",
    "client",
    "config",
    "incoming",
    "keeping",
    "link_speed",
    "offer",
    "participant",
    "profile",
    "setup",
    "states",
]
