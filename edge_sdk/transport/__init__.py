"""How messages travel: ZeroMQ with CURVE, or memory. Knows no model."""

__all__ = [
    "addresses",
    "descriptors",
    "enrol",
    "enrol_code",
    "handshake",
    "keys",
    "link",
    "memory_link",
    "sockets",
    "zmq_link",
]
