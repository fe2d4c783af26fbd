"""Which blocks and which ranks each device gets; pure decisions that can be explained."""

__all__ = ["costs", "fixed", "joint", "problem", "run_planner"]
