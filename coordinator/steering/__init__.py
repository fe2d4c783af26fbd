"""What an operator wants of a run that goes on, from another shell: pause it, or stop it."""

__all__ = ["asking", "listener", "socket_path", "wishes"]
