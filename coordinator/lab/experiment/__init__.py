"""Runs on boards behind ssh or on emulated ones, with faults, from one file."""

__all__ = ["completed_runs", "config", "outcome", "planned_runs", "testbed"]
