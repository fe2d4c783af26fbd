"""How a `key=value` on a command line can go on, for a shell: keys, choices, file names."""

from __future__ import annotations

import dataclasses
import glob
import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from edge_sdk.config.values import field_types


class KeyValues:
    """Completes settings of a dataclass; argcomplete calls it with what has been typed.

    Args:
        config: Returns the dataclass; it may have to import it.
        within: Only what lies below this key, as in `data.`.
    """

    def __init__(self, config: Callable[[], type], within: str = "") -> None:
        self._config, self._within = config, within

    def __call__(self, prefix: str, **_: object) -> list[str]:
        """Return all words that begin with *prefix*."""
        typed, equals, value = prefix.partition("=")
        keys = {k: v for k, v in known_keys(self._config()) if k.startswith(self._within)}
        if not equals:
            return [f"{key}=" for key in keys if key.startswith(prefix)]
        if typed not in keys:
            return []
        return [f"{typed}={found}" for found in _values(keys[typed], value)]


def known_keys(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of a dataclass with what its value may be; names of one's own aside."""
    for name, annotation in field_types(config).items():
        types_ = [part for part in _parts(annotation) if isinstance(part, type)]
        inner = [part for part in types_ if dataclasses.is_dataclass(part)]
        for group in inner:
            yield from known_keys(group, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}", annotation


def _parts(annotation: Any) -> list[Any]:
    """Return the members of a union, or the one thing that it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]


def _values(annotation: Any, typed: str) -> list[str]:
    """Return the values that begin with what was typed."""
    found: list[str] = []
    for part in _parts(annotation):
        if typing.get_origin(part) is Literal:
            found += [str(choice) for choice in typing.get_args(part)]
        elif part is bool:
            found += ["true", "false"]
        elif part in (str, Path):  # many a text is a file, and no other guess is better
            found += _files(typed)
    return [value for value in found if value.startswith(typed)]


def _files(typed: str) -> list[str]:
    """Return files and folders whose names begin with what was typed."""
    names = sorted(glob.glob(f"{glob.escape(os.path.expanduser(typed))}*"))
    return [f"{name}/" if os.path.isdir(name) else name for name in names]
