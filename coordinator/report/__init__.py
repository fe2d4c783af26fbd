"""A run on one page: what it learned, who did what, what it cost, and what went wrong."""

__all__ = ["at_end", "template", "write"]
