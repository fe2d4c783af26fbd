"""What kernel and drivers of this board say of themselves now, each value with its source."""

__all__ = [
    "board",
    "cgroup",
    "heat",
    "kernel_files",
    "load",
    "memory",
    "memory_budget",
    "monitor",
    "overview",
    "readings",
    "sources",
]
