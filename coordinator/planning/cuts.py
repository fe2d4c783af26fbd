"""How many blocks a device may hold, by the model and by the config; pure.

It chooses nothing: see `splits.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from coordinator.config.planning import PlanningConfig
from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from edge_sdk.model.layout import Layout


def allowed_cuts(planning: PlanningConfig, layout: Layout) -> tuple[int, ...]:
    """Return the numbers of blocks that a device may hold: the model's cuts from `min_split` on.

    Raises:
        ConfigError: the model has fewer blocks than that.
    """
    least, last = planning.min_split, layout.num_blocks
    if least > last:
        raise ConfigError(f"planning.min_split: {least} is outside 1..{last} (the model's blocks)")
    return tuple(cut for cut in layout.cuts if cut >= least)


def given_split(
    planning: PlanningConfig, layout: Layout, split: int | Literal["all"], *, is_own: bool
) -> int:
    """Return the split that the config gives a device where nothing else chooses it.

    Where splits are planned, `default.split` is for devices of which too little is known, and no
    less than `planning.min_split`.

    Args:
        planning: Who chooses split points.
        layout: The model's blocks.
        split: What stands in the config.
        is_own: Whether that is the device's own, and not the default.
    """
    if split == "all":
        return layout.num_blocks
    if is_own or planning.split == "fixed":
        return split
    return max(split, allowed_cuts(planning, layout)[0])
