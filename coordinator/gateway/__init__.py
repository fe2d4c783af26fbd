"""Devices as the coordinator sees them: who may come, who is here, what they send.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["allow_list", "gateway", "interface", "link_probe"]
