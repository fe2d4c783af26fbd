"""Adapters on the frozen weights: which weights, which factors, and how important each is."""

__all__ = [
    "adapters",
    "exchange",
    "expert_adapters",
    "factors",
    "folding",
    "importance",
    "numpy_adapters",
    "optimizer_state",
    "rank_pruning",
    "targets",
]
