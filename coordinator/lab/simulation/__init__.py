"""Devices that are not there, with real training and a modelled clock.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["boards", "clock", "config", "data", "fleet", "result", "run", "sharding"]
