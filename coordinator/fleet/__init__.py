"""Devices on boards behind ssh: what lies on each, what is missing there, and how it is brought."""

__all__ = ["config", "deploy", "on_board"]
