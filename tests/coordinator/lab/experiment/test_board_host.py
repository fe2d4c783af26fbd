"""A board's power mode: brought about by the board's own command, and read back from the board."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.lab.experiment.board_host import BoardHost, make_host
from coordinator.lab.experiment.config import (
    BoardConfig,
    ExperimentConfig,
    ExperimentSection,
    PowerModeConfig,
)
from coordinator.remote.shell import SshShell
from edge_sdk.errors import DeviceError


class HereShell(SshShell):
    """A board behind ssh that is this machine, without ssh."""

    def words(self, command: Sequence[str]) -> list[str]:
        """The command itself."""
        return list(command)


def make(tmp_path: Path) -> BoardHost:
    """A board with two modes, one of which it refuses."""
    commands = {"low": f"echo low > {tmp_path / 'mode'}", "bad": "echo no such mode >&2; exit 3"}
    board = BoardConfig(ssh="me@a", power_commands=commands)
    shell = HereShell("me@a", python=sys.executable)
    return BoardHost("a", board, shell, str(tmp_path), str(tmp_path))


def test_a_board_is_brought_into_its_mode(tmp_path: Path) -> None:
    """By its command; a machine that has no power modes says nothing of one."""
    host = make(tmp_path)

    assert host.enter_power_mode(None) is None
    assert not (tmp_path / "mode").exists()
    assert host.enter_power_mode("low") is None
    assert (tmp_path / "mode").read_text() == "low\n"


def test_a_mode_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    """With the board, the mode and what the board said."""
    with pytest.raises(DeviceError, match="board a: power mode bad: .*no such mode"):
        make(tmp_path).enter_power_mode("bad")


def test_an_emulated_board_has_no_command(tmp_path: Path) -> None:
    """Its mode is a share of cores and watts, and nothing is run."""
    boards = {"a": BoardConfig(emulated="orin-nano-8gb")}
    section = ExperimentSection(power_modes={"low": PowerModeConfig(speed=0.5)})
    config = ExperimentConfig(model="m", boards=boards, experiment=section)

    assert make_host(config, "a", tmp_path, "x").enter_power_mode("low") is None
