"""Who of those that are ready is in a round."""

__all__ = ["selection"]
