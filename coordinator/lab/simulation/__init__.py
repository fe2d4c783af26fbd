"""Devices that are not there, with real training and a modelled clock."""

__all__ = ["boards", "clock", "config", "data", "fleet", "result", "run", "sharding", "traffic"]
