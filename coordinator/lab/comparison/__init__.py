"""Methods against each other on the same devices, and a report."""

__all__ = [
    "cells",
    "config",
    "fit_devices",
    "plots",
    "published",
    "rank_energy",
    "report",
    "result_table",
    "run",
    "run_count",
    "search",
    "statistics",
    "sweeps",
    "table",
]
