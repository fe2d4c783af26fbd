"""Devices as the coordinator sees them: who may come, who is here, what they send."""

__all__ = [
    "doorkeeper",
    "gateway",
    "interface",
    "keys",
    "link_probe",
    "port",
    "ration",
    "replays",
    "residuals",
    "traffic",
]
