"""Devices that are not registered yet: codes by which they may, and keys that were refused."""

__all__ = ["book", "desk", "refused"]
