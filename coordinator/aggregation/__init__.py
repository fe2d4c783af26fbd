"""What devices and coordinator have learned in a round, made one."""

__all__ = ["ledger", "limits", "round_start", "rules"]
