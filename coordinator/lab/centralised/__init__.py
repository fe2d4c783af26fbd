"""All data on one machine: the yardstick of every other method.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["run", "trainer"]
