"""What came of an experiment: runs read back, tables of boards, faults and power, the report."""

__all__ = ["report"]
