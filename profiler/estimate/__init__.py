"""What a stretch of a model would need: bytes and operations, computed from its sizes alone.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["flops", "memory", "sizes"]
