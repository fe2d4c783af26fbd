"""What is to lie on a board, and which of it is missing there: texts and decisions, no I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from coordinator.fleet.config import BoardPlan
from edge_sdk.errors import ConfigError

CONFIG, KEY, DATA = "device.yaml", "device.key", "data"
DONE = ".complete"
"""In an environment in which everything is installed."""
HEAD = "# Written by `coordinator deploy`, and again with every change of its boards.yaml.\n"
SYSTEMD = ("user", "system")
ENVIRONMENT, REGISTER, MAKE_KEY, PUT_DATA, PUT_CONFIG, PUT_UNIT, START = (
    "environment",
    "register",
    "key",
    "data",
    "config",
    "unit",
    "start",
)
"""What may have to be done, in this order."""
_INTENT = {
    ENVIRONMENT: "install EdgeSplit",
    MAKE_KEY: "make and register a key",
    REGISTER: "register its key",
    PUT_DATA: "bring the data",
    PUT_CONFIG: "write the config",
    PUT_UNIT: "write the unit",
    START: "start",
}


@dataclass(frozen=True)
class Wanted:
    """What lies on a board when nothing is missing."""

    venv: str | None
    """Folder of the environment; None where somebody else has made one."""
    config: str
    data_name: str | None
    data_sha256: str | None
    unit: str
    """Text of the systemd unit."""
    registered: str | None
    """The public key that stands in the allow-list under the board's name."""


def missing(wanted: Wanted, found: Mapping[str, Any]) -> list[str]:
    """Return what must be done, in its order; *found* is the board's own answer to `look`."""
    files, steps = found["files"], []
    if wanted.venv is not None and files.get(f"{wanted.venv}/{DONE}") is None:
        steps.append(ENVIRONMENT)
    if files.get(KEY) is None or found["public"] is None:
        steps.append(MAKE_KEY)
    elif found["public"] != wanted.registered:
        steps.append(REGISTER)
    if wanted.data_name is not None and files.get(wanted.data_name) != wanted.data_sha256:
        steps.append(PUT_DATA)
    if files.get(CONFIG) != sha256(wanted.config):
        steps.append(PUT_CONFIG)
    if found["kind"] in SYSTEMD and found["unit"] != sha256(wanted.unit):
        steps.append(PUT_UNIT)
    needs_start = bool(set(steps) - {REGISTER}) or found["state"] != "active"
    if found["kind"] != "none" and needs_start:
        steps.append(START)
    return steps


def in_words(steps: Sequence[str]) -> str:
    """Return what would be done."""
    return f"would {', '.join(_INTENT[step] for step in steps)}" if steps else "nothing to do"


def sha256(text: str) -> str:
    """Return the hash of a text as a file has it."""
    return hashlib.sha256(text.encode()).hexdigest()


def device_config(plan: BoardPlan, folder: str, address: str, server_key: str) -> str:
    """Return the text of the device's config, which lies in *folder*.

    Raises:
        ConfigError: a setting is no `key=value`, or is a group and a value at once.
    """
    tree: dict[str, Any] = {
        "coordinator": address,
        "server_key": server_key,
        "secret_key": KEY,
        "state": "state",
        "cache": "parts",
    }
    if plan.data is not None:
        tree["data"] = {"path": f"{folder}/{data_name(plan)}"}
    for setting in plan.settings:
        key, equals, value = setting.partition("=")
        *groups, leaf = key.split(".")
        if not equals or not leaf:
            raise ConfigError(f"boards.{plan.name}.settings: {setting!r} is no key=value")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"boards.{plan.name}.settings: {group} is no group of keys")
        place[leaf] = _value(value)
    return HEAD + "".join(f"{key}: {json.dumps(value)}\n" for key, value in tree.items())


def _value(text: str) -> Any:
    """Return what a value means where a config file has it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def data_name(plan: BoardPlan) -> str:
    """Return the name of the data file on the board; its ending says which format it has."""
    assert plan.data is not None
    return DATA + "".join(plan.data.suffixes)


def unit_name(plan: BoardPlan) -> str:
    """Return the name of the systemd unit: one for each device, several fit one machine."""
    return f"edgesplit-{plan.name}.service"


def command(python: str, folder: str, *words: str) -> list[str]:
    """Return a call of `edge-sdk` with the device's config."""
    return [python, "-m", "edge_sdk.cli", *words, "--config", f"{folder}/{CONFIG}"]


def unit_text(plan: BoardPlan, found: Mapping[str, Any], python: str) -> str:
    """Return the unit, after examples/jetson/edgesplit-device.service."""
    folder, is_system = found["folder"], found["kind"] == "system"
    words = " ".join(command(python, folder, "run"))
    lines = [
        "# Written by `coordinator deploy`.",
        "[Unit]",
        f"Description=EdgeSplit device {plan.name}",
        "Wants=network-online.target time-sync.target",
        "After=network-online.target time-sync.target",
        "StartLimitIntervalSec=15min",
        "StartLimitBurst=10",
        "[Service]",
        "Type=exec",
        f"ExecStart={words}",
        f"WorkingDirectory={folder}",
        "Environment=PYTHONUNBUFFERED=1",
        *([f"User={found['user']}"] if is_system else []),
        "SuccessExitStatus=130",
        "Restart=on-failure",
        "RestartPreventExitStatus=2 4 7 8",
        "RestartSec=20",
        "TimeoutStopSec=60",
        "MemoryHigh=75%",
        "MemoryMax=85%",
        "OOMScoreAdjust=800",
        "OOMPolicy=kill",
        "NoNewPrivileges=yes",
        "LockPersonality=yes",
        "UMask=0077",
        "[Install]",
        f"WantedBy={'multi-user' if is_system else 'default'}.target",
    ]
    return "\n".join(lines) + "\n"


def venv_name(plan: BoardPlan, package: bytes) -> str:
    """Return the name of the environment that *package*, with all that goes with it, makes."""
    made_of = repr((plan.extras, plan.first, plan.packages, plan.python)).encode()
    return f"venv-{hashlib.sha256(package + made_of).hexdigest()[:16]}"


def first_failure(findings: Sequence[Mapping[str, str]], ignored: Sequence[str]) -> str:
    """Return the first check of the doctor that has failed, with its cure; empty where none has."""
    for finding in findings:
        if finding["status"] == "failure" and finding["check"] not in ignored:
            cure = f"; {finding['cure']}" if finding.get("cure") else ""
            return f"doctor: {finding['check']}: {finding['text']}{cure}"
    return ""
