"""Steps, rounds and runs: what must happen next, and who carries it out.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["executor", "launch", "loop", "run"]
