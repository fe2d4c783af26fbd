"""What a run leaves behind and shows meanwhile: folder, metrics, console."""

__all__ = [
    "console",
    "events",
    "history",
    "json_text",
    "lifecycle",
    "metrics",
    "result_files",
    "run_config",
    "run_folder",
    "run_lock",
    "session_counters",
    "standing",
    "watchers",
]
