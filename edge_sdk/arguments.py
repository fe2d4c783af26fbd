"""How our commands read their words: overrides anywhere among the options, examples in the help.

Knows no command; what the words mean is decided where they are used.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_sdk.config.keys import KeyValues

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=.*", re.DOTALL)
_KEY = re.compile(r"-[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{39}")
"""A public key that begins with a minus, and looks like an option."""


class Arguments(argparse.ArgumentParser):
    """A parser that minds no order: `key=value` may stand anywhere, behind a list as well."""

    def parse_known_args(  # type: ignore[override] # argparse's own overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as argparse does, overrides at the end."""
        has_commands = any(isinstance(a, argparse._SubParsersAction) for a in self._actions)  # noqa: SLF001
        if args is not None and not has_commands:
            args = self._in_order(list(args))
        return super().parse_known_args(args, namespace)

    def _in_order(self, words: list[str]) -> list[str]:
        """Return the same words: options, all that has a place of its own, then `key=value`."""
        dests = {action.dest for action in self._actions}
        kept: list[str] = []
        placed: list[str] = []
        overrides: list[str] = []
        option: argparse.Action | None = None
        for index, word in enumerate(words):
            if word == "--":
                overrides += words[index + 1 :]
                break
            is_key = "key" in dests and _KEY.fullmatch(word) is not None
            if word.startswith("-") and len(word) > 1 and not is_key:
                option = self._option(word)
                kept.append(word)
            elif "overrides" in dests and _is_override(word, option):
                overrides.append(word)
            elif option is None or is_key:
                placed.append(word)
            else:
                kept.append(word)
                option = None if option.nargs is None else option
        return [*kept, "--", *placed, *overrides] if placed or overrides else kept

    def _option(self, word: str) -> argparse.Action | None:
        """Return the option that takes the next words; None where it takes none of them."""
        name, equals, _ = word.partition("=")
        full = [text for text in self._option_string_actions if text.startswith(name)]
        found = self._option_string_actions.get(name)
        if found is None and len(full) == 1 and name.startswith("--"):
            found = self._option_string_actions[full[0]]
        if found is None or equals or found.nargs == 0:
            return None
        return found


def _is_override(word: str, option: argparse.Action | None) -> bool:
    """Whether *word* is a `key=value`; among the files of a list, one that is there is a file."""
    if not _OVERRIDE.fullmatch(word) or (option is not None and option.nargs is None):
        return False
    return option is None or option.type is not Path or not Path(word).exists()


def all_commands(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Return each command that can be run, by its words, `client register` for instance."""
    below = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]  # noqa: SLF001
    if not below:
        yield name, parser
    for action in below:
        for word, child in action.choices.items():
            yield from all_commands(child, f"{name} {word}".strip())


def complete_settings(
    parser: argparse.ArgumentParser, config: Callable[[], type], within: str = ""
) -> None:
    """Let a shell complete the `key=value` of a command; arguments as those of `KeyValues`."""
    for action in parser._actions:  # noqa: SLF001
        if action.dest == "overrides":
            action.completer = KeyValues(config, within)  # type: ignore[attr-defined]


def add_examples(parser: argparse.ArgumentParser, examples: Mapping[str, Sequence[str]]) -> None:
    """Let the help of each command end with its *examples*, which leave the program's name out."""
    for name, command in all_commands(parser):
        if lines := examples.get(name):
            shown = [f"  {parser.prog} {line}" for line in lines]
            command.epilog = "\n".join(["examples:", *shown])
            command.description = textwrap.fill(command.description or "", 80) or None
            command.formatter_class = argparse.RawDescriptionHelpFormatter
