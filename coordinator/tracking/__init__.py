"""A run's numbers where people already look: TensorBoard, Weights & Biases, MLflow, Prometheus."""

__all__ = ["reporting", "trackers"]
