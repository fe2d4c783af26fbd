"""What devices may ask for, how often, and in whose turn: nobody gets more than a share."""

__all__ = ["allowance", "evaluations", "parts", "savers"]
