"""When a run ends before its last round: as somebody wants it to, or nothing better is to come."""

__all__ = ["asking", "early_stopping", "listener", "socket_path", "wishes"]
