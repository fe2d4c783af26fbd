"""Methods against each other on the same devices, and a report.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["config", "fit_devices", "plots", "report", "run", "table"]
