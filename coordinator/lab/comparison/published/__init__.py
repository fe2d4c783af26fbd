"""A published experiment: its paper's numbers, the data that it needs, smaller scales of it."""

__all__ = ["config", "ours", "recipe", "table"]
