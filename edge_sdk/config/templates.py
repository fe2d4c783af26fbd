"""Commented configurations to begin with: a template, and what a person already knows of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from edge_sdk.files import create_file


def filled(template: str, values: Mapping[str, str | None]) -> str:
    """Return *template* with other values of some of its top-level keys; None leaves one as it is.

    Raises:
        KeyError: the template has no line of that key.
    """
    for key, value in values.items():
        if value is None:
            continue
        word = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
        line = re.search(rf"^{re.escape(key)}: (\S+)", template, re.MULTILINE)
        if line is None:
            raise KeyError(key)
        template = template[: line.start(1)] + word + template[line.end(1) :]
    return template


def write_config(target: Path, text: str) -> None:
    """Write a configuration that is not there yet.

    Raises:
        StorageError: it is there already, or cannot be written.
    """
    create_file(target, text, 0o644)
