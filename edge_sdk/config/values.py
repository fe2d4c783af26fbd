"""Settings become typed values: what a dataclass's annotations allow, and a clear word otherwise.

Every function here takes the settings for one key from all layers, weakest first. A single value is
taken from the last layer; mappings are laid over each other key by key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edge_sdk.config.sources import Entries, Items, Leaf, Node, Text, parse_text
from edge_sdk.errors import ConfigError

_WORDS = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Spot:
    """One place in the configuration: its dotted key, and whether its value may be shown."""

    key: str
    is_secret: bool = False

    def child(self, name: str, *, is_secret: bool = False) -> Spot:
        """Return the spot one key further down."""
        return Spot(f"{self.key}.{name}" if self.key else name, self.is_secret or is_secret)

    def wrong(self, annotation: Any, node: Node) -> ConfigError:
        """Return the error for a *node* that is no *annotation*."""
        got = "this value (a secret, not shown)" if self.is_secret else _shown(node)
        hint = "" if self.is_secret else _hint(_raw(node), _choices(annotation))
        hint = hint or (node.hint if isinstance(node, Leaf) else "")
        return ConfigError(
            f"{node.origin.where}: {self.key} must be {type_words(annotation)}, got {got}{hint}"
        )


def type_words(annotation: Any) -> str:
    """Say in words what *annotation* allows."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    if dataclasses.is_dataclass(annotation):
        return "a group of keys"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if _is_union(origin):
        return " or ".join(type_words(option) for option in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list, each {type_words(arguments[0])}"
    if origin is dict and arguments[0] is str:
        return f"a mapping, each value {type_words(arguments[1])}"
    raise TypeError(f"a configuration field cannot be a {annotation}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the annotations of the dataclass *cls*, resolved."""
    return typing.get_type_hints(cls)


def build(cls: Any, nodes: Sequence[Node], spot: Spot, base: object = None) -> Any:
    """Make a *cls* of the settings in *nodes*; what they leave open comes from *base*."""
    layers = by_key(cls, nodes, spot)
    place = next((f"{node.origin.where}: " for node in nodes if node.origin.folder), "")
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, given in layers.items():
        if key not in names:
            raise ConfigError(_unknown_key(spot.child(key).key, key, given[-1], names))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        annotation = field_types(cls)[field.name]
        inner = spot.child(field.name, is_secret=bool(field.metadata.get("secret")))
        default = default_of(field) if base is None else getattr(base, field.name)
        value = _field_value(annotation, layers.get(field.name, []), inner, default)
        if value is dataclasses.MISSING:
            words = type_words(annotation)
            raise ConfigError(f"{place}{inner.key} is missing; it must be {words}")
        values[field.name] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(_rejection(error, layers, spot)) from error


def convert(annotation: Any, nodes: Sequence[Node], spot: Spot, base: object = None) -> Any:
    """Return the value of one key: *nodes* as an *annotation*."""
    if dataclasses.is_dataclass(annotation):
        return build(annotation, [_spelled_out(annotation, node) for node in nodes], spot, base)
    if annotation is Path:
        return _convert_path(nodes[-1], spot)
    if annotation in _WORDS:
        return _convert_scalar(annotation, nodes[-1], spot)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(origin):
        return _convert_union(annotation, nodes, spot, base)
    if origin is Literal:
        return _convert_literal(annotation, nodes[-1], spot)
    if origin is tuple:
        return _convert_items(annotation, nodes[-1], spot)
    if origin is dict:
        return {
            key: convert(arguments[1], given, spot.child(key))
            for key, given in by_key(annotation, nodes, spot).items()
        }
    raise TypeError(f"{spot.key}: a configuration field cannot be a {annotation}")


def _spelled_out(cls: Any, node: Node) -> Node:
    """Return a plain word as the mapping that it stands for, where a field of *cls* takes one."""
    word = next((f.name for f in dataclasses.fields(cls) if f.metadata.get("word")), None)
    if word is None:
        return node
    parsed = _parsed(node)
    is_word = isinstance(parsed, Leaf) and isinstance(parsed.value, str)
    return Entries({word: node}, node.origin) if is_word else node


def by_key(annotation: Any, nodes: Sequence[Node], spot: Spot) -> dict[str, list[Node]]:
    """Lay mappings over each other: the settings of all layers for each key."""
    layers: dict[str, list[Node]] = {}
    for node in map(_parsed, nodes):
        if not isinstance(node, Entries):
            raise spot.wrong(annotation, node)
        for key, value in node.entries.items():
            layers.setdefault(key, []).append(value)
    return layers


def _field_value(annotation: Any, nodes: list[Node], spot: Spot, default: Any) -> Any:
    """Return the value of one field, or `dataclasses.MISSING` where a required one is not given."""
    if nodes:
        return convert(
            annotation, nodes, spot, default if dataclasses.is_dataclass(default) else None
        )
    if default is dataclasses.MISSING and dataclasses.is_dataclass(annotation):
        return build(annotation, [], spot)
    return default


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of *field*, or `dataclasses.MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _unknown_key(path: str, key: str, node: Node, names: list[str]) -> str:
    allowed = ", ".join(names) or "none"
    hint = _hint(key, {name: repr(name) for name in names}) or f"; the keys here are {allowed}"
    return f"{node.origin.where}: unknown key {path!r}{hint}"


def _rejection(error: ValueError, layers: dict[str, list[Node]], spot: Spot) -> str:
    """Say which setting a `__post_init__` refused: it names the field, we name the place.

    A reason that begins with a key and a colon blames that key, whatever else it mentions.
    """
    text = " ".join(str(error).split())
    words = [word.strip("`'\",;:()") for word in text.split()]
    if text.split(" ", 1)[0].endswith(":") and _place(words[0], layers):
        words = words[:1]
    blamed = {word: place for word in words if (place := _place(word, layers))}
    ordered = sorted(blamed, key=lambda word: list(layers).index(word.partition(".")[0]))
    places = [blamed[word] for word in ordered]
    places = places or [given[-1].origin.where for given in layers.values()] or ["defaults"]
    return f"{', '.join(dict.fromkeys(places))}: {spot.key + ': ' if spot.key else ''}{text}"


def _place(key: str, layers: Mapping[str, Sequence[Node]]) -> str:
    """Return where a dotted *key* was given, or the group that it is of; empty: neither was."""
    name, *below = key.split(".")
    given = list(layers.get(name, []))
    for inner in below:
        groups = [node for node in map(_parsed, given) if isinstance(node, Entries)]
        given = [group.entries[inner] for group in groups if inner in group.entries] or given
    return given[-1].origin.where if given else ""


# ---- one value -----------------------------------------------------------------------------------


def _convert_union(annotation: Any, nodes: Sequence[Node], spot: Spot, base: object) -> Any:
    options = typing.get_args(annotation)
    last = nodes[-1]
    if type(None) in options and _is_null(last):
        return None
    rest = [option for option in options if option is not type(None)]
    if len(rest) == 1:
        below = [index for index, node in enumerate(nodes) if _is_null(node)]
        if below:  # null wiped out what the weaker layers said
            nodes, base = nodes[below[-1] + 1 :], None
        return convert(rest[0], nodes, spot, base)
    # Text and paths last: whatever somebody types into a shell could be either.
    for option in sorted(rest, key=lambda option: option in (str, Path)):
        try:
            return convert(option, nodes, spot, base)
        except ConfigError:
            continue
    raise spot.wrong(annotation, last)


def _convert_literal(annotation: Any, node: Node, spot: Spot) -> Any:
    for choice in typing.get_args(annotation):
        if _scalar(type(choice), node) == choice:
            return choice
    raise spot.wrong(annotation, node)


def _convert_scalar(kind: type, node: Node, spot: Spot) -> Any:
    value = _scalar(kind, node)
    if value is None:
        raise spot.wrong(kind, node)
    return value


def _scalar(kind: type, node: Node) -> Any:
    """Return *node* as a *kind*, or None where it is something else; an integer is a float too."""
    value: Any = _text(node) if kind is str else _raw(_parsed(node))
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    is_kind = type(value) is kind and value == value  # nan is no number
    return value if is_kind else None


def _convert_items(annotation: Any, node: Node, spot: Spot) -> tuple[Any, ...]:
    parsed = _parsed(node)
    if not isinstance(parsed, Items):
        raise spot.wrong(annotation, node)
    item_type = typing.get_args(annotation)[0]
    return tuple(
        convert(item_type, [item], Spot(f"{spot.key}[{index}]", spot.is_secret))
        for index, item in enumerate(parsed.items)
    )


def _convert_path(node: Node, spot: Spot) -> Path:
    value = _scalar(str, node)
    if not value:
        raise spot.wrong(Path, node)
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise spot.wrong(Path, node) from None  # ~ of a user whom this machine does not know
    return node.origin.folder / path if node.origin.folder is not None else path


def _parsed(node: Node) -> Node:
    return parse_text(node) if isinstance(node, Text) else node


def _text(node: Node) -> object:
    """Return *node* as text; what a shell gave is text as it stands, unless it is quoted."""
    if isinstance(node, Text) and not node.text.startswith(("'", '"')):
        return node.text
    return _raw(_parsed(node))


def _is_null(node: Node) -> bool:
    if isinstance(node, Text):
        return node.text.strip() in {"", "~", "null"}
    return isinstance(node, Leaf) and node.value is None


def _is_union(origin: Any) -> bool:
    return origin is typing.Union or origin is types.UnionType


def _raw(node: Node) -> object:
    if isinstance(node, Leaf):
        return node.value
    return node.text if isinstance(node, Text) else node


def _shown(node: Node) -> str:
    if isinstance(node, Items):
        return f"a list of {len(node.items)}"
    if isinstance(node, Entries):
        return "a mapping"
    value = _raw(node)
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 80 else f"{text[:77]}..."


def _choices(annotation: Any) -> dict[str, str]:
    """Return the texts that *annotation* allows, and how a suggestion is to write each."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {choice: repr(choice) for choice in arguments if isinstance(choice, str)}
    below = {text: shown for option in arguments for text, shown in _choices(option).items()}
    return {text: f"[{text}]" for text in below} if origin is tuple else below


def _hint(word: object, known: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1) if isinstance(word, str) else []
    return f"; did you mean {known[close[0]]}?" if close else ""
