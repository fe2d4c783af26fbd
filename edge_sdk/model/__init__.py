"""A transformers model in pieces: which tensors a stretch of blocks needs, and how it runs."""

__all__ = [
    "experts",
    "kept",
    "layout",
    "loss",
    "partition",
    "precision",
    "quantized",
    "safetensors_files",
    "shape",
    "shrunk",
    "split_check",
    "weights",
]
