"""The laboratory: simulated runs, comparisons, experiments. The product imports none of it."""

__all__ = ["centralised", "comparison", "experiment", "privacy", "rates", "simulation"]
