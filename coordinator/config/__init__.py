"""What a run is told: files, published methods, planning."""

__all__ = [
    "buffered",
    "centralised",
    "early_stopping",
    "engine",
    "exchange",
    "planning",
    "presets",
    "prompts",
    "replay",
    "run",
    "scoring",
]
