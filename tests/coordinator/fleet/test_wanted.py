"""What is missing on a board is decided from what it says; texts say what they must."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.fleet.config import DeployConfig, DeployedBoard, plan_of
from coordinator.fleet.wanted import (
    ENVIRONMENT,
    MAKE_KEY,
    PUT_CONFIG,
    PUT_DATA,
    PUT_UNIT,
    REGISTER,
    START,
    Wanted,
    device_config,
    first_failure,
    in_words,
    missing,
    sha256,
    unit_text,
    venv_name,
)
from edge_sdk.errors import ConfigError

WANTED = Wanted(
    venv="venv-1",
    config="c",
    data_name="data.jsonl",
    data_sha256="d",
    unit="u",
    registered="key",
)
WHOLE: dict[str, Any] = {
    "files": {
        "venv-1/.complete": "x",
        "device.key": "x",
        "device.yaml": sha256("c"),
        "data.jsonl": "d",
    },
    "public": "key",
    "kind": "user",
    "unit": sha256("u"),
    "state": "active",
}


def plan(**settings: Any) -> Any:
    """Return the plan of a board called `kitchen`."""
    return plan_of(
        DeployConfig(boards={"kitchen": DeployedBoard(ssh="me@k", **settings)}), "kitchen"
    )


def without(*files: str, **more: Any) -> dict[str, Any]:
    """Return a board that lacks some files, or is otherwise other than it should be."""
    kept = {name: None if name in files else value for name, value in WHOLE["files"].items()}
    return {**WHOLE, "files": kept, **more}


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        (WHOLE, []),
        (without("venv-1/.complete"), [ENVIRONMENT, START]),
        (without("device.key"), [MAKE_KEY, START]),
        (without(public=None), [MAKE_KEY, START]),
        (without(public="other"), [REGISTER]),
        (without("data.jsonl"), [PUT_DATA, START]),
        (without("device.yaml"), [PUT_CONFIG, START]),
        (without(unit=None), [PUT_UNIT, START]),
        (without(unit=None, kind="process"), []),
        (without(state="failed"), [START]),
        (without(state="inactive", kind="none"), []),
        (
            without(*WHOLE["files"], public=None, unit=None, state="inactive"),
            [ENVIRONMENT, MAKE_KEY, PUT_DATA, PUT_CONFIG, PUT_UNIT, START],
        ),
    ],
)
def test_only_what_is_missing_is_done(found: dict[str, Any], steps: list[str]) -> None:
    """A change starts the device anew, a registration alone does not."""
    assert missing(WANTED, found) == steps
    assert (in_words(steps) == "nothing to do") == (not steps)


def test_an_environment_is_named_after_all_that_is_in_it() -> None:
    """Another wheel, extra, package or interpreter makes another one; the same makes the same."""
    names = [
        venv_name(plan(), b"wheel"),
        venv_name(plan(), b"other"),
        venv_name(plan(extras=("torch",)), b"wheel"),
        venv_name(plan(packages=("numpy<2",)), b"wheel"),
        venv_name(plan(python="python3.11"), b"wheel"),
    ]

    assert len(set(names)) == len(names)
    assert venv_name(plan(), b"wheel") == names[0]


def test_settings_become_the_groups_of_a_config() -> None:
    """Numbers, lists and truths as YAML has them; the board's words come after those for all."""
    config = DeployConfig(
        for_all=DeployedBoard(settings=("threads=2", "profile.memory_bytes=5e9")),
        boards={"a": DeployedBoard(ssh="x", settings=("threads=3", "recompute=true"))},
    )

    found = yaml.safe_load(device_config(plan_of(config, "a"), "/home/a", "tcp://c:1", "K"))

    assert found["coordinator"] == "tcp://c:1"
    assert (found["threads"], found["recompute"]) == (3, True)
    assert float(found["profile"]["memory_bytes"]) == 5e9


@pytest.mark.parametrize("settings", [("threads",), ("data=x", "data.path=y"), ("=1",)])
def test_what_is_no_setting_is_refused(settings: tuple[str, ...]) -> None:
    """The board is named."""
    with pytest.raises(ConfigError, match="boards.kitchen.settings"):
        device_config(plan(settings=settings), "", "tcp://c:1", "K")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("kind", ["user", "system"])
def test_systemd_understands_the_unit(kind: str, tmp_path: Path) -> None:
    """No key is unknown and no value is wrong, for a user's manager and the system's."""
    found = {"folder": str(tmp_path), "kind": kind, "user": "root"}
    unit = tmp_path / "edgesplit-kitchen.service"
    unit.write_text(unit_text(plan(), found, shutil.which("true") or "/bin/true"))

    done = subprocess.run(
        ["systemd-analyze", "verify", f"--{kind}", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path)},
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_first_failure_is_told_with_its_cure() -> None:
    """Warnings are none, and nor is what fails because nobody serves yet."""
    findings = [
        {"check": "swap", "status": "warning", "text": "none", "cure": "x"},
        {"check": "reach", "status": "failure", "text": "refused", "cure": ""},
        {"check": "data", "status": "failure", "text": "no rows", "cure": "look at it"},
    ]

    assert first_failure(findings, ("reach",)) == "doctor: data: no rows; look at it"
    assert first_failure(findings[:2], ("reach",)) == ""
    assert first_failure(findings, ()).startswith("doctor: reach")
