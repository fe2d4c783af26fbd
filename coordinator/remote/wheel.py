"""The wheel of this very version of EdgeSplit, made where it runs from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edge_sdk.errors import ConfigError


def build_wheel(folder: Path, cure: str) -> Path:
    """Build a wheel of this checkout in *folder*.

    Args:
        folder: Where it is put.
        cure: What a person does where there is no checkout.

    Raises:
        ConfigError: EdgeSplit was not installed from a checkout, or the build failed.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        raise ConfigError(f"there is no checkout to build a wheel from; {cure}")
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(root)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines()
        raise ConfigError(f"cannot build a wheel: {lines[-1] if lines else 'pip failed'}; {cure}")
    return wheels[-1]
