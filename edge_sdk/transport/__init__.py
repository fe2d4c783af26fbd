"""How messages travel: ZeroMQ with CURVE, or memory. Knows no model.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["handshake", "keys", "link", "memory_link", "sockets", "zmq_link"]
