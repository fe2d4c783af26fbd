"""A page to watch a run on: read from the run's folder alone, in a process of its own."""

__all__ = ["access", "beside", "listening", "runs", "serving"]
