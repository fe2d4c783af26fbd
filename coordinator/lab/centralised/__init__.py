"""All data on one machine: the yardstick of every other method."""

__all__ = ["run", "trainer"]
