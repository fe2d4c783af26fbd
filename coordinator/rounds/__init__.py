"""Steps, rounds and runs: what must happen next, and who carries it out."""

__all__ = ["launch", "loop"]
