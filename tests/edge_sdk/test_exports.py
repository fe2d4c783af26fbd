"""The door of the SDK."""

from __future__ import annotations

import subprocess
import sys

import edge_sdk


def test_public_names_are_sorted_and_there() -> None:
    """The door lists its names in order, so that a diff shows an API change, and each exists."""
    assert edge_sdk.__all__ == sorted(edge_sdk.__all__, key=str.casefold)
    assert all(hasattr(edge_sdk, name) for name in edge_sdk.__all__)
    assert set(edge_sdk.__all__) <= set(dir(edge_sdk))
    assert not hasattr(edge_sdk, "Edge")


def test_the_door_itself_loads_nothing() -> None:
    """Importing the package takes no library; using a name of it does."""
    code = "import sys, edge_sdk; before = 'numpy' in sys.modules; edge_sdk.EdgeClient; "
    code += "print(before, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
