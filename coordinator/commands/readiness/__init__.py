"""What is looked at before a run: everything but the model itself, and what the run would take."""

__all__ = ["devices", "findings", "forecast"]
