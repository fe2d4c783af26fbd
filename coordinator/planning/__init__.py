"""Which blocks and which ranks each device gets; pure decisions that can be explained.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["costs", "fixed", "joint", "problem", "run_planner"]
