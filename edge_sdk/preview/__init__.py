"""Shows a person on this device what a run would make of the data: `edge-sdk data preview`."""

__all__ = ["drawing", "survey"]
