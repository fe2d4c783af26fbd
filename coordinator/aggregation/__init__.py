"""What devices and coordinator have learned in a round, made one.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["ledger", "round_start", "rules"]
