"""One comparison for each value of some keys, and a report on what the values change."""

__all__ = ["grid", "picture", "report", "table"]
