"""Blocks and their gradients as ONNX graphs, for devices without torch."""

__all__ = ["cache", "export", "job"]
