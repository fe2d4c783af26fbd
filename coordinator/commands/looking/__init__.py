"""Looking at runs, without touching them: in a terminal, in a browser."""

__all__ = ["page", "status"]
