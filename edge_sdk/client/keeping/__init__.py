"""What a device keeps of its part in a round, and how it leaves without losing it."""

__all__ = ["leaving", "own_state"]
