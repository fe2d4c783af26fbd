"""Lines of plans.jsonl: nothing is lost, and they are short."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from coordinator.results.plan_rows import packed, unpacked
from edge_sdk.protocol.plan import Plan

WEIGHTS = [f"model.layers.{block}.{name}" for block in range(3) for name in ("q", "k", "up")]


def make(ranks: dict[str, int], split: int = 1) -> Plan:
    """Return a plan with these ranks."""
    return Plan(split=split, ranks=ranks, alphas={}, batch_size=4, micro_batch=2, tail=False)


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=2),
        st.dictionaries(st.sampled_from(WEIGHTS), st.integers(0, 64)),
        max_size=5,
    )
)
def test_who_reads_a_line_has_the_plans(ranks: dict[str, dict[str, int]]) -> None:
    """Every device has its own weights and no others, with their ranks, after JSON as well."""
    plans = {device: make(own, split=1 + len(own)) for device, own in ranks.items()}

    row = unpacked(json.loads(json.dumps({"round": 3, **packed(plans, "micro_batch")})))

    told = {d: {"split": p.split, "ranks": p.ranks, "micro_batch": 2} for d, p in plans.items()}
    assert row == {"round": 3, "plans": told}


def test_a_line_of_an_earlier_version_is_read() -> None:
    """Lines with ranks by weight stay as they are."""
    row = {"round": 0, "reasons": ["first plans"], "plans": {"a": {"split": 1, "ranks": {"q": 8}}}}

    assert unpacked(row) == row


def test_a_line_of_a_thousand_unequal_devices_is_short() -> None:
    """At 22 blocks with 7 weights each it takes at most 600 bytes a device, not 7 KB."""
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down"]
    names = [f"model.layers.{block}.{kind}" for block in range(22) for kind in kinds]
    plans = {
        f"device-{n:04}": make({name: (n + i) % 17 for i, name in enumerate(names)}, split=22)
        for n in range(1000)
    }

    assert len(json.dumps(packed(plans), separators=(",", ":"))) < 600 * len(plans)
