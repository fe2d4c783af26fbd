"""Looks for what would break a run on this device, before it does.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["examine", "finding"]
