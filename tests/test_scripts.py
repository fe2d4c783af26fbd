"""The scripts that people and CI start: they say what they do, and stop where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, venv: str) -> subprocess.CompletedProcess[str]:
    """Run a script with *venv* as the virtual environment to use, and no input."""
    return subprocess.run(
        ["sh", str(ROOT / script)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "EDGESPLIT_VENV": venv},
    )


def test_setup_leaves_somebodys_environment_alone() -> None:
    """An environment given by EDGESPLIT_VENV is used as it is."""
    result = run("scripts/setup", sys.prefix)

    assert result.returncode == 0
    assert result.stdout == f"setup: using {sys.prefix} as it is (EDGESPLIT_VENV)\n"


@pytest.mark.parametrize(
    "script",
    ["scripts/setup", "scripts/lint", "scripts/docs", "scripts/docs-models", "scripts/test-ort"],
)
def test_a_missing_environment_is_named(script: str, tmp_path: Path) -> None:
    """A script without its interpreter fails with one line that says what is missing."""
    result = run(script, str(tmp_path))

    assert result.returncode == 1
    assert str(tmp_path) in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "script",
    [
        "scripts/setup",
        "scripts/lint",
        "scripts/test",
        "scripts/test-ort",
        "scripts/docs",
        "scripts/docs-models",
        "scripts/same-bits",
        ".ci/run",
    ],
)
def test_a_script_can_be_started(script: str) -> None:
    """Scripts are executable and a plain shell understands them."""
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["sh", "-n", str(ROOT / script)], check=True)
