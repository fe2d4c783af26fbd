"""Steps, rounds and runs: what must happen next, and who carries it out."""

__all__ = [
    "admission",
    "executor",
    "global_model",
    "handlers",
    "launch",
    "loop",
    "pausing",
    "run",
    "state",
    "validation",
    "waves",
]
