"""What a run is told: files, published methods, planning.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["centralised", "planning", "presets", "run"]
