"""How messages travel: ZeroMQ with CURVE, or memory. Knows no model."""

__all__ = [
    "addresses",
    "descriptors",
    "handshake",
    "keys",
    "link",
    "memory_link",
    "sockets",
    "zmq_link",
]
