"""Which learning rate to begin with: a short training of which the rate grows with each step."""

__all__ = ["generated", "picture", "suggestion", "sweep"]
