"""Where a run stands now, for whoever asks from another shell: state, devices, what is left."""

__all__ = [
    "live_file",
    "observed",
    "pulse",
    "service_manager",
    "standing",
    "timeline",
    "words",
]
