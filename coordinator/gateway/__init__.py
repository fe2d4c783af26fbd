"""Devices as the coordinator sees them: who may come, who is here, what they send."""

__all__ = [
    "allow_list",
    "doorkeeper",
    "enrolment",
    "gateway",
    "interface",
    "link_probe",
    "port",
    "replays",
    "residuals",
    "traffic",
]
