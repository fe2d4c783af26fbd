"""Rounds without a barrier: a device's round is its own, and merged when it comes."""

__all__ = ["executor", "handlers", "model", "run", "tours", "visits"]
