"""The door of the SDK."""

from __future__ import annotations

import edge_sdk


def test_public_names_are_sorted_and_there() -> None:
    """The door lists its names in order, so that a diff shows an API change, and each exists."""
    assert edge_sdk.__all__ == sorted(edge_sdk.__all__, key=str.casefold)
    assert all(hasattr(edge_sdk, name) for name in edge_sdk.__all__)
