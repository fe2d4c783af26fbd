"""Which blocks and which ranks each device gets; pure decisions that can be explained."""

__all__ = [
    "costs",
    "fixed",
    "interface",
    "joint",
    "objective",
    "plan_set",
    "problem",
    "problem_files",
    "ranks",
    "run_planner",
]
