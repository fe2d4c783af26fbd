"""Methods against each other on the same devices, and a report."""

__all__ = ["config", "fit_devices", "plots", "report", "run", "table"]
