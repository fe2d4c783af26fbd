"""Runs on boards behind ssh or on emulated ones, with faults, from one file.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["completed_runs", "config", "report", "testbed"]
