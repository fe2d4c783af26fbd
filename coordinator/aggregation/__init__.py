"""What devices and coordinator have learned in a round, made one."""

__all__ = ["accounts", "ledger", "limits", "round_start", "rules"]
