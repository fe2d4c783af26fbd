"""Chat templates in a process of their own, with bounds that the kernel holds."""

__all__ = ["renderer"]
