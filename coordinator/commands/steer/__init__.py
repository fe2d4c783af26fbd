"""Commands by which a person steers a run: end it, ask or measure its model, find its rate."""

__all__ = ["generate", "leave", "lr_find", "score"]
