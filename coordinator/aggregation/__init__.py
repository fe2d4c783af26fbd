"""What devices and coordinator have learned in a round, made one."""

__all__ = [
    "accounts",
    "buffer",
    "ledger",
    "limits",
    "reach",
    "robust",
    "round_start",
    "rules",
    "screening",
    "spectrum",
    "versions",
]
