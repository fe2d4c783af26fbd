"""A configuration as text: YAML that loads back, and a description of every key.

The description feeds docs/configuration.md and --help. It reads the source with `ast`, because
Python keeps no docstring for a field.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from edge_sdk.config.sources import teach_scalars
from edge_sdk.config.values import default_of, field_types, type_words


class ConfigRow(NamedTuple):
    """What one key means."""

    key: str
    """Dotted; `<name>` stands for a key of the user's choice, `[]` for an item of a list."""
    type: str
    default: str
    """YAML on one line; `required` where there is none."""
    doc: str


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Quoted, a line break stands as \n and not as a real one, which YAML folds into spaces.
    style = '"' if text.splitlines() not in ([], [text]) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


teach_scalars(_Dumper)
_Dumper.add_representer(str, _represent_text)


def dump_config(config: object, *, without_secrets: bool = False) -> str:
    """Return *config* as YAML that `load_config` turns into an equal object.

    A relative path is written as an absolute one: in a file it would start from the file's folder,
    and the text is meant to be stored elsewhere.

    Args:
        config: A configuration dataclass.
        without_secrets: Leave out the fields marked with `metadata=SECRET`.
    """
    tree = _plain(config, without_secrets=without_secrets)
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def describe(cls: type, prefix: str = "") -> list[ConfigRow]:
    """Return one row per key of the dataclass *cls*, nested ones dotted, in order of the fields."""
    return _rows(cls, prefix, None)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the text under each field of *cls* and of its bases, on one line."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            docs.update(_own_field_docs(owner))
    return docs


def _plain(value: object, *, without_secrets: bool = False, absolute: bool = True) -> Any:
    """Return *value* as dicts, lists and scalars."""
    down = functools.partial(_plain, without_secrets=without_secrets, absolute=absolute)
    if dataclasses.is_dataclass(value):
        return {
            field.name: down(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init and not (without_secrets and field.metadata.get("secret"))
        }
    if isinstance(value, dict):
        return {key: down(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [down(item) for item in value]
    if isinstance(value, Path):
        return str(value.absolute() if absolute else value)
    return value


def _rows(cls: type, prefix: str, base: object) -> list[ConfigRow]:
    rows = []
    for field in dataclasses.fields(cls):
        if field.init:
            default = default_of(field) if base is None else getattr(base, field.name)
            rows += _field_rows(cls, field, f"{prefix}{field.name}", default)
    return rows


def _field_rows(
    cls: type, field: dataclasses.Field[Any], key: str, default: object
) -> list[ConfigRow]:
    annotation = field_types(cls)[field.name]
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        base = None if default is dataclasses.MISSING else default
        return _rows(annotation, f"{key}.", base)
    words, doc = type_words(annotation), field_docs(cls).get(field.name, "")
    is_hidden = default and field.metadata.get("secret")
    row = ConfigRow(key, words, "(secret)" if is_hidden else _default_text(default), doc)
    return [row, *_rows_below(annotation, key)]


def _rows_below(annotation: Any, key: str) -> list[ConfigRow]:
    """Return the rows of the dataclasses inside an optional value, a mapping or a list."""
    suffix = {dict: ".<name>", tuple: "[]"}.get(typing.get_origin(annotation), "")
    rows = []
    for argument in typing.get_args(annotation):
        if isinstance(argument, type) and dataclasses.is_dataclass(argument):
            rows += _rows(argument, f"{key}{suffix}.", None)
        elif typing.get_origin(argument) in (dict, tuple):
            rows += _rows_below(argument, f"{key}{suffix}")
    return rows


def _default_text(default: object) -> str:
    if default is dataclasses.MISSING:
        return "required"
    text: str = yaml.dump(
        _plain(default, absolute=False), Dumper=_Dumper, default_flow_style=True, width=10_000
    )
    return text.removesuffix("...\n").strip()


def _own_field_docs(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class typed into a prompt, a frozen program
        return {}
    parsed, docs = ast.parse(source).body[0], {}
    assert isinstance(parsed, ast.ClassDef)
    for field, below in zip(parsed.body, parsed.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value.value if _is_text(below) else ""  # type: ignore[attr-defined]
            docs[field.target.id] = " ".join(text.split())
    return docs


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
