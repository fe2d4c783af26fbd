"""What a device says of itself follows from how it computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.client_config import ClientConfig
from edge_sdk.device_profile import device_profile
from profiler.profile import DeviceProfile, problems

BY_HAND = DeviceProfile(memory_bytes=2e9, overhead_bytes=3e8, flops_per_s=1e9)


@pytest.mark.parametrize(
    ("settings", "recompute", "linear_bytes"),
    [
        ({"backend": "torch"}, None, None),
        ({"backend": "torch", "recompute": True}, "slice", None),
        ({"backend": "torch", "base": "int8", "recompute": True}, "slice", 1.0),
        ({"backend": "onnxruntime"}, "block", None),
    ],
)
def test_memory_is_planned_as_it_is_used(
    settings: dict[str, Any], recompute: str | None, linear_bytes: float | None
) -> None:
    """Quantised weights and activations that are computed again are told to the planner."""
    config = ClientConfig(coordinator="tcp://host:1", server_key="k", profile=BY_HAND, **settings)

    found = device_profile(config, Path("unused"), 16)

    assert found == replace(BY_HAND, recompute=recompute, linear_bytes=linear_bytes)
    assert problems(found) == []


def test_an_unknown_way_to_compute_is_refused() -> None:
    """A device of another version may say what nobody here can plan."""
    profile = replace(BY_HAND, recompute="sometimes")

    assert problems(profile) == ["recompute is 'sometimes', not one of none, slice, block"]
