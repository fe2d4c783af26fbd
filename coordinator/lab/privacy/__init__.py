"""How much of a text somebody recovers who sees what leaves a device, by attacks that are run."""

__all__ = ["audit", "config", "picture", "report", "table"]
