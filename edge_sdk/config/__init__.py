"""Configuration files, environment and overrides to checked dataclasses, and back to text."""

__all__ = ["describe", "keys", "loader", "sources", "templates", "values"]
