"""Where settings come from: YAML files, the environment and `key=value`, each with its origin.

Knows nothing of dataclasses; `values.py` gives the settings their types. A setting keeps its
origin so that an error can name the line to mend, and the folder a relative path starts from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edge_sdk.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a setting, in words for an error message."""

    where: str
    folder: Path | None = None
    """Folder that a relative path starts from; None for the current one."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A single value."""

    value: object
    origin: Origin
    hint: str = ""
    """Why this may be another value than was meant; empty where nothing speaks for that."""


@dataclass(frozen=True, slots=True)
class Items:
    """A list of values."""

    items: tuple[Node, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Entries:
    """Values by key."""

    entries: dict[str, Node]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Text:
    """What somebody typed into a shell; what it means depends on the type of its field."""

    text: str
    origin: Origin


Node = Leaf | Items | Entries | Text


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of plain scalars.

    In YAML 1.1, which PyYAML speaks, `1e-4` is text, `no` is false, `010` is 8, `1:30` is 90 and
    `2026-01-01` is a date: each has spoiled somebody's configuration.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


# What a plain word of YAML cannot begin with, and a word alone behind a key that does.
_INDICATORS = "{}[]*&!>|@%`#"
_UNQUOTED = re.compile(r"""([\w.-]+):\s+([{}\[\]*&!>|@%`#][^\s,{}\[\]]\S*|[^\s'"{\[]\S*:)\s*$""")
_SCALARS = {
    "null": ("~nN", r"~|null|Null|NULL|"),
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+"),
    "float": (
        "-+.0123456789",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.inf|\.nan",
    ),
}


def teach_scalars(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """Make a loader or dumper tell text from other plain scalars as we do."""
    for name, (first, pattern) in _SCALARS.items():
        starts = [*first, ""] if name == "null" else list(first)
        tag = f"tag:yaml.org,2002:{name}"
        kind.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), starts)


teach_scalars(_Loader)


def read_layers(
    file: str | Path | None,
    overrides: Iterable[str],
    env: Mapping[str, str],
    env_prefix: str,
    ignore: Collection[str] = (),
) -> list[Node]:
    """Return the settings of every source, the weakest first."""
    layers = [read_file(Path(file))] if file is not None else []
    return layers + from_environment(env, env_prefix, ignore) + from_overrides(overrides)


def read_file(file: Path) -> Node:
    """Read a YAML file into a tree of settings; an empty file gives none."""
    folder = file.absolute().parent
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start})") from error
    node = _parse(text, str(file), folder, numbered=True)
    if isinstance(node, Leaf) and node.value is None:
        return Entries({}, Origin(str(file), folder))
    if not isinstance(node, Entries):
        raise ConfigError(f"{file}: must hold `key: value` pairs at the top level")
    return node


def parse_text(text: Text) -> Node:
    """Read what somebody typed as YAML."""
    return _parse(text.text, text.origin.where, text.origin.folder, numbered=False)


def from_environment(env: Mapping[str, str], prefix: str, ignore: Collection[str]) -> list[Node]:
    """Return a tree per variable that begins with *prefix*; `__` descends into a nested setting."""
    names = sorted(name for name in env if name.startswith(prefix) and name not in ignore)
    trees = []
    for name in names:
        origin = Origin(f"environment variable {name}")
        path = name[len(prefix) :].lower().split("__")
        trees.append(_branch(path, Text(env[name], origin)))
    return trees


def from_overrides(overrides: Iterable[str]) -> list[Node]:
    """Return a tree per `dotted.key=value`."""
    trees = []
    for override in overrides:
        key, equals, value = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"override {override!r} must look like key=value or group.key=value")
        trees.append(_branch(path, Text(value, Origin(f"override {key.strip()}"))))
    return trees


def _branch(path: list[str], leaf: Text) -> Node:
    node: Node = leaf
    for key in reversed(path):
        node = Entries({key: node}, leaf.origin)
    return node


def _parse(text: str, where: str, folder: Path | None, *, numbered: bool) -> Node:
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Leaf(None, Origin(where, folder))
        return _Tree(loader, where, folder, numbered).convert(node)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_error(error, where, numbered, text)) from error
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{where}: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{where}: nested too deeply, or an alias within its own anchor"
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


def _syntax_error(error: yaml.YAMLError, where: str, numbered: bool, text: str) -> str:
    mark, begin = (getattr(error, name, None) for name in ("problem_mark", "context_mark"))
    lines, unquoted = text.splitlines(), ""
    blamed = None if mark is None else mark.line
    problem = getattr(error, "problem", None) or str(error)
    places = [at.line for at in (begin, mark) if at is not None]
    for place in (*places, *(line - 1 for line in places)):
        if not unquoted and 0 <= place < len(lines) and (unquoted := quote_hint(lines[place])):
            blamed, problem = place, problem.replace(lines[place].split()[-1], "...")
    line = f":{blamed + 1}" if numbered and blamed is not None else ""
    return f"{where}{line}: not valid YAML: {' '.join(problem.split())}{unquoted}"


def quote_hint(line: str) -> str:
    """Return what to do about a `key: word` whose word YAML takes for something else; else empty.

    A public key may begin with any of these letters, or end with a colon.
    """
    found = _UNQUOTED.search(line)
    if found is None:
        return ""
    key, word = found[1], found[2]
    reason = f"begins with {word[0]!r}" if word[0] in _INDICATORS else "ends with ':'"
    return f"; quote a value that {reason}: {key}: '...'"


@dataclass(frozen=True, slots=True)
class _Tree:
    """Turns PyYAML's nodes, which still know their lines, into ours."""

    loader: Any
    where: str
    folder: Path | None
    numbered: bool

    def convert(self, node: Any) -> Node:
        origin = self.origin(node)
        if isinstance(node, yaml.MappingNode):
            return self.convert_mapping(node, origin)
        if isinstance(node, yaml.SequenceNode):
            return Items(tuple(self.convert(item) for item in node.value), origin)
        value = self.loader.construct_object(node, deep=True)
        return Leaf(value, origin, self.unread(node) if value is None else "")

    def unread(self, node: Any) -> str:
        """Return why there is no value where something stands: a comment, or an anchor."""
        mark = node.start_mark
        if node.value or mark.buffer is None:
            return ""
        lines = mark.buffer.rstrip("\0").splitlines()
        return quote_hint(lines[mark.line]) if mark.line < len(lines) else ""

    def convert_mapping(self, node: Any, origin: Origin) -> Entries:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self.origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place.where}: a key must be plain text")
            key = key_node.value
            if key in entries:
                first = entries[key].origin.where
                raise ConfigError(f"{place.where}: key {key!r} is given twice, first at {first}")
            entries[key] = self.convert(value_node)
        return Entries(entries, origin)

    def origin(self, node: Any) -> Origin:
        line = f":{node.start_mark.line + 1}" if self.numbered else ""
        return Origin(f"{self.where}{line}", self.folder)
