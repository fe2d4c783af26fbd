"""Whether a difference is one: intervals and paired tests over seeds, and a ranking."""

__all__ = ["differences", "estimate", "measures", "picture", "ranking"]
