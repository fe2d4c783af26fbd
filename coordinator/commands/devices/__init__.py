"""Commands about devices: who may take part, by which key, and how a key is registered."""

__all__ = ["client", "enrol"]
