"""Commands for a coordinator and boards that something else starts: systemd, Docker, Kubernetes."""

__all__ = ["deploy", "health"]
