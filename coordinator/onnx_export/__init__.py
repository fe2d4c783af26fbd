"""Blocks and their gradients as ONNX graphs, for devices without torch.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["cache", "export", "job"]
