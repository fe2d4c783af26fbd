"""Plans while a run goes on: thought out in a thread of their own, told by the loop."""

__all__ = ["changes", "desk"]
