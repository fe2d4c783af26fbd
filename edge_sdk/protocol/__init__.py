"""What device and coordinator say to each other, as functions of bytes: no I/O and no clock."""

__all__ = [
    "channel",
    "codecs",
    "fragments",
    "messages",
    "packets",
    "plan",
    "positions",
    "quantize",
    "replay",
    "residual",
    "roomy",
    "session",
    "tensors",
]
