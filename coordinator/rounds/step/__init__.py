"""Inside a step: which micro-batches are here, and which of them are run together."""

__all__ = ["away", "open_step", "top_gradients", "wave_choice"]
