"""The coordinator's blocks in actors on a Ray cluster: stages in a row, replicas side by side."""

__all__ = ["engine"]
