"""A command is a function that registers it, and a line in the list of commands."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest

from coordinator import cli
from coordinator.commands.parser import add_command


def add_hello(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    parser = add_command(commands, "hello", "greet somebody", _hello)
    parser.add_argument("name")


def _hello(options: argparse.Namespace) -> int:
    sys.stdout.write(f"hello {options.name}\n")
    return 0


def test_a_new_command_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs by its name, with its arguments."""
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, add_hello))

    code = cli.main(["hello", "you"])

    assert (code, capsys.readouterr().out) == (0, "hello you\n")
