"""What computes the coordinator's share of the model, for many devices at once.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["compute_thread", "interface", "local", "server_model"]
