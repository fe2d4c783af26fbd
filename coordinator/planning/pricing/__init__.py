"""What there is to choose from, weight by weight."""

__all__ = ["rank_tables"]
