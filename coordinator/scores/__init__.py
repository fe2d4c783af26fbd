"""Scores of texts and of classes, as those define them who print them; no model and no run."""

__all__ = ["classes", "measures"]
