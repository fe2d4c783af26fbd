"""What is typed in any order means the same, and what only looks like an option is none."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import coordinator.cli
import coordinator.commands.examples
import edge_sdk.cli
import profiler.cli
from edge_sdk.arguments import Arguments, all_commands

KEY = "-" + "k" * 39


def parser() -> Arguments:
    """A parser with one of each kind of option."""
    made = Arguments(prog="tool")
    made.add_argument("--presets", nargs="+")
    made.add_argument("--rates", nargs="+", type=float)
    made.add_argument("--profiles", nargs="+", type=Path)
    made.add_argument("--config")
    made.add_argument("--explain", action="store_true")
    made.add_argument("overrides", nargs="*")
    return made


ORDERS = {
    "behind a list": ["--presets", "a", "b", "rounds=2", "lora.r=4"],
    "before it": ["rounds=2", "lora.r=4", "--presets", "a", "b"],
    "on both sides": ["rounds=2", "--presets", "a", "b", "lora.r=4"],
    "inside it": ["--presets", "a", "rounds=2", "b", "lora.r=4"],
    "behind a flag": ["--presets", "a", "b", "--explain", "rounds=2", "lora.r=4"],
    "behind --": ["--presets", "a", "b", "--", "rounds=2", "lora.r=4"],
    "by the beginning of its name": ["--pres", "a", "b", "rounds=2", "lora.r=4"],
}


@pytest.mark.parametrize("words", ORDERS.values(), ids=ORDERS)
def test_overrides_may_stand_anywhere(words: list[str]) -> None:
    """A list of words ends where a `key=value` begins, and several groups of these are one."""
    found = parser().parse_args(words)

    assert found.presets == ["a", "b"]
    assert found.overrides == ["rounds=2", "lora.r=4"]


def test_a_list_of_numbers_or_files_ends_there_too(tmp_path: Path) -> None:
    """What is no number is not refused as one; a file whose name has an equals sign is a file."""
    file = tmp_path / "a=b.json"
    file.touch()

    found = parser().parse_args(["--rates", "1e-3", "rounds=2", "--profiles", str(file), "x=1"])

    assert found.rates == [1e-3]
    assert found.profiles == [file]
    assert found.overrides == ["rounds=2", "x=1"]


def test_what_stands_before_an_option_takes_nothing_from_behind_it() -> None:
    """A file, an option and then `key=value`, of which argparse itself says that it knows none."""
    made = Arguments(prog="tool")
    made.add_argument("file")
    made.add_argument("--out")
    made.add_argument("overrides", nargs="*")

    found = made.parse_args(["a.yaml", "rounds=1", "--out", "x", "rounds=2"])

    assert (found.file, found.out, found.overrides) == ("a.yaml", "x", ["rounds=1", "rounds=2"])


@pytest.mark.parametrize("words", [["--config", "a=b"], ["--config=a=b"]])
def test_the_value_of_an_option_stays_its_value(words: list[str]) -> None:
    """`--config a=b` names a file, whatever it is called."""
    found = parser().parse_args([*words, "rounds=2"])

    assert found.config == "a=b"
    assert found.overrides == ["rounds=2"]


@pytest.mark.parametrize("words", [["cam", KEY, "--list", "x"], ["--list", "x", "cam", KEY]])
def test_a_key_is_no_option(words: list[str]) -> None:
    """A public key that begins with a minus is taken as it stands, wherever it stands."""
    made = Arguments(prog="tool")
    made.add_argument("name")
    made.add_argument("key")
    made.add_argument("--list")

    found = made.parse_args(words)

    assert (found.name, found.key, found.list) == ("cam", KEY, "x")


PROGRAMS = {
    "coordinator": (coordinator.cli.make_parser, coordinator.commands.examples.EXAMPLES),
    "edge-sdk": (edge_sdk.cli.make_parser, edge_sdk.cli.EXAMPLES),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_every_command_ends_with_examples_that_work(program: str) -> None:
    """Each command has some, each is read by the parser as that command, and no other is left."""
    make, examples = PROGRAMS[program]
    commands = dict(all_commands(make()))

    assert sorted(commands) == sorted(examples)
    for name, lines in examples.items():
        shown = commands[name].format_help().split("examples:\n")[1].splitlines()
        assert shown == [f"  {program} {line}" for line in lines]
        for line in lines:
            assert line.split()[: len(name.split())] == name.split()
            assert make().parse_args(shlex.split(line)).run


@pytest.mark.parametrize("command", ["show", "measure", "watch"])
def test_so_does_that_of_the_profiler(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Which stands below the others, and has a parser of its own."""
    with pytest.raises(SystemExit):
        profiler.cli.main([command, "--help"])

    assert f"examples:\n  profiler {command}\n" in capsys.readouterr().out
