"""Configuration files, environment and overrides to checked dataclasses, and back to text.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["describe", "loader", "sources", "values"]
