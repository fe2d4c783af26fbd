"""What computes a device's blocks: torch, or onnxruntime with numpy."""

__all__ = [
    "half_range",
    "interface",
    "onnx_gradients",
    "onnx_graphs",
    "onnx_runtime",
    "onnx_session",
    "onnx_sizes",
    "torch_runtime",
    "training",
    "training_state",
    "transfers",
]
