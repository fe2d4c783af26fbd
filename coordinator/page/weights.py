"""Names of weights as a model has them: in which block one lies, and of what kind it is."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def place_of(weight: str) -> tuple[int, str] | None:
    """Return the block and the kind of a weight, as 3 and `attn.q_proj`; None outside of blocks."""
    match = _BLOCK.search(weight)
    return None if match is None else (int(match[1]), weight[match.end() :])
