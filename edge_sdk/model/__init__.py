"""A transformers model in pieces: which tensors a stretch of blocks needs, and how it runs."""

__all__ = [
    "experts",
    "layout",
    "loss",
    "partition",
    "precision",
    "quantized",
    "safetensors_files",
    "shape",
    "shrunk",
    "split_check",
    "split_proof",
    "weights",
]
