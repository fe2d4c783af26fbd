"""What a run leaves behind and shows meanwhile: folder, metrics, console, exports."""

__all__ = [
    "console",
    "events",
    "export",
    "history",
    "json_text",
    "lifecycle",
    "metrics",
    "result_files",
    "run_folder",
    "watchers",
]
