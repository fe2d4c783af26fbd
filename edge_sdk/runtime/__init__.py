"""What computes a device's blocks: torch, or onnxruntime with numpy.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["interface", "onnx_graphs", "onnx_runtime", "onnx_session", "torch_runtime", "training"]
