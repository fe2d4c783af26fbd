"""A transformers model in pieces: which tensors a stretch of blocks needs, and how it runs.

Other packages import the modules that are named here, and no other.
"""

__all__ = [
    "layout",
    "loss",
    "partition",
    "precision",
    "quantized",
    "safetensors_files",
    "shape",
    "weights",
]
