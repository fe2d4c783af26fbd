"""The learning rate of each method: searched coarse to fine, and what the search says of it."""

__all__ = ["config", "diverged", "grid", "picture", "table"]
