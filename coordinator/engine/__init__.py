"""What computes the coordinator's share of the model, for many devices at once."""

__all__ = [
    "blocks",
    "compute_thread",
    "interface",
    "local",
    "passage",
    "ray",
    "room",
    "server_model",
    "share",
    "stage",
    "whole",
]
