"""What lines of plans.jsonl hold of plans: names of weights once, not with each device's ranks.

A thousand devices with 154 adapted weights each would make a line of 11 MB of mostly names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edge_sdk.protocol.plan import Plan

Row = Mapping[str, Any]


def packed(plans: Mapping[str, Plan], *fields: str) -> dict[str, Any]:
    """Return `weights` and `plans` of a line.

    Args:
        plans: By device.
        fields: What else of a plan stands there, beside its split.
    """
    names = dict.fromkeys(name for plan in plans.values() for name in plan.ranks)
    return {
        "weights": list(names),
        "plans": {
            device: {
                "split": plan.split,
                "ranks": _trimmed(plan.ranks.get(name) for name in names),
                **{field: getattr(plan, field) for field in fields},
            }
            for device, plan in plans.items()
        },
    }


def _trimmed(ranks: Iterable[int | None]) -> list[int | None]:
    """Return ranks without the weights at the end that a plan does not have."""
    found = list(ranks)
    while found and found[-1] is None:
        found.pop()
    return found


def unpacked(row: Row) -> dict[str, Any]:
    """Return a line with ranks by weight; earlier versions wrote them so."""
    names, found = row.get("weights"), dict(row)
    if names is not None:
        del found["weights"]
        found["plans"] = {
            device: {**plan, "ranks": _named(names, plan["ranks"])}
            for device, plan in row["plans"].items()
        }
    return found


def _named(names: list[str], ranks: list[int | None]) -> dict[str, int]:
    pairs = zip(names, ranks, strict=False)  # weights at the end that it does not have
    return {name: rank for name, rank in pairs if rank is not None}
