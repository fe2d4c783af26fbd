"""Looks for what would break a run on this device, before it does."""

__all__ = ["before", "examine", "finding"]
