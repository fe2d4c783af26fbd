"""Other machines: commands and programs behind ssh, and the wheel that is brought there."""

__all__ = ["shell", "supervisor", "wheel"]
