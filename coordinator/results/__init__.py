"""What a run leaves behind and shows meanwhile: folder, metrics, console, exports."""

__all__ = [
    "console",
    "events",
    "export",
    "history",
    "lifecycle",
    "metrics",
    "run_folder",
    "watchers",
]
