"""What a run's model says when it is asked, and what that is worth."""

__all__ = ["scoring", "texts"]
