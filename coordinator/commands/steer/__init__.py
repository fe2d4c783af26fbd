"""Commands by which a person steers a run: end it, ask its model, find its learning rate."""

__all__ = ["generate", "leave", "lr_find"]
