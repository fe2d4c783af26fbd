"""Commands for a coordinator, and boards, that somebody else starts: systemd, Docker, Kubernetes."""

__all__ = ["health"]
