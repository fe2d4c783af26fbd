"""What a device says of itself follows from how it computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.client.config import ClientConfig
from edge_sdk.client.profile import device_profile
from profiler.profile import DeviceProfile, problems

BY_HAND = DeviceProfile(memory_bytes=2e9, overhead_bytes=3e8, flops_per_s=1e9)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"backend": "torch"}, {}),
        ({"backend": "torch", "recompute": True}, {"recompute": "slice"}),
        (
            {"backend": "torch", "base": "int8", "recompute": True},
            {"linear_bytes": 1.0, "recompute": "slice"},
        ),
        ({"backend": "torch", "compute": "bfloat16"}, {"compute_bytes": 2.0}),
        (
            {"backend": "torch", "compute": "bfloat16", "base": "bfloat16"},
            {"compute_bytes": 2.0, "base_bytes": 2.0, "linear_bytes": 2.0},
        ),
        ({"backend": "onnxruntime"}, {"recompute": "block"}),
    ],
)
def test_memory_is_planned_as_it_is_used(settings: dict[str, Any], told: dict[str, Any]) -> None:
    """Widths of weights and activations, and what is computed again, are told to the planner."""
    config = ClientConfig(
        coordinator="tcp://host:1", server_key="k", device="cpu", profile=BY_HAND, **settings
    )

    found = device_profile(config, Path("unused"), 16)

    assert found == replace(BY_HAND, **told)
    assert problems(found) == []


def test_an_unknown_way_to_compute_is_refused() -> None:
    """A device of another version may say what nobody here can plan."""
    profile = replace(BY_HAND, recompute="sometimes")

    known = "none, slice, block, own-block"
    assert problems(profile) == [f"recompute is 'sometimes', not one of {known}"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flops_per_s": 1e19}, "more than any device has"),
        ({"up_bytes_per_s": 1.7e308}, "more than any device has"),
        ({"round_trip_s": 1e5}, "longer than any way"),
    ],
)
def test_speeds_have_bounds(changes: dict[str, Any], said: str) -> None:
    """What no device and no link can do is no ground for a plan."""
    assert [said in line for line in problems(replace(BY_HAND, **changes))] == [True]
