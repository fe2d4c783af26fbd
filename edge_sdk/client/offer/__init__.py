"""What a device decides about itself before it takes part: how its frozen weights lie in memory."""

__all__ = ["base_choice"]
