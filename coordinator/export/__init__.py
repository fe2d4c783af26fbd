"""A run's result in files that other programs read; each is read back before it counts as done."""

__all__ = [
    "adapter",
    "asked",
    "check",
    "facts",
    "merged",
    "needs",
    "options",
    "outcome",
    "run",
    "run_facts",
    "trained",
]
