"""What a stretch of a model would need: bytes and operations, computed from its sizes alone."""

__all__ = ["flops", "memory", "sizes"]
