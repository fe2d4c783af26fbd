"""What can happen in a run, as values."""

__all__ = [
    "devices",
    "event",
    "plans",
    "reporting",
    "rounds",
    "run",
    "steering",
    "tours",
]
