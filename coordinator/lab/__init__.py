"""The laboratory: simulated runs, comparisons, experiments. The product imports none of it.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["centralised", "comparison", "experiment", "simulation"]
