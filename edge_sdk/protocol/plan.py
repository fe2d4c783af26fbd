"""What the coordinator decides for one device, and the pieces of the model that this takes.

Part of the protocol: both travel inside messages. How a plan is found is not decided here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edge_sdk.names import PartBytes, PartName, Sha256

# Micro-batches that a device may have under way; the coordinator keeps the input of all but one.
MOST_IN_FLIGHT = 4
# Where waves are made of what is there and labels stay on the devices, the coordinator has as many
# rows between forward and backward pass as so many micro-batches of every device.
MOST_AWAY = 2
Place = tuple[str, int]
"""Device and number of a micro-batch in its step."""

Residual = Literal["auto", "folded", "low-rank"]
"""How a frozen residual is computed with: added to the frozen weight once a round, or as factors
beside it at every step; `auto` adds it where nothing is lost by that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One downloadable piece of the model: a safetensors file known by its content."""

    name: PartName
    """`files` (config and tokenizer), `front`, `block.<i>`, `tail`."""
    sha256: Sha256
    num_bytes: PartBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one device runs: written by the planner, sent as it stands."""

    split: int
    """Blocks 0 .. split-1 run on the device; split = number of blocks is federated LoRA."""
    ranks: dict[str, int]
    """Rank of each adapted weight on the device, by whole-model module name."""
    alphas: dict[str, float]
    """LoRA alpha of each adapted weight; its scale is alpha / rank (or alpha / sqrt(rank))."""
    batch_size: int
    """Sequences of one optimizer step."""
    micro_batch: int
    """Sequences that pass through the model together; divides the step into micro-batches."""
    in_flight: int = 1
    """Micro-batches of a step that are under way at the same time."""
    tail: bool = False
    """Whether final norm and head run on the device (labels: device, or split = all blocks)."""
    residual: str = "auto"
    """How the frozen residual is computed with: `auto`, `folded` or `low-rank`."""
    residual_rank: int = 0
    """Most ranks of a residual beside a weight that are computed with; 0: all of them."""

    @property
    def is_forward_only(self) -> bool:
        """Whether the device's blocks are frozen: no gradient comes back to them."""
        return not any(self.ranks.values())


def hash_of_parts(sha256s: Mapping[str, str]) -> str:
    """Return one hash for a whole model: that of its parts' hashes, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(sha256s):
        digest.update(f"{name} {sha256s[name]}\n".encode())
    return digest.hexdigest()


def fingerprint(plan: Plan) -> str:
    """Return a short name for what *plan* makes of a model: equal for plans whose adapters fit."""
    held = [plan.split, plan.tail, sorted(plan.ranks.items()), sorted(plan.alphas.items())]
    return hashlib.sha256(repr(held).encode()).hexdigest()[:12]
