"""Which values of which keys are swept, and the grid that they make. Pure."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import yaml

from edge_sdk.errors import ConfigError

Value = str | int | float | bool | None
# Of a folder's name.
_ODD = re.compile(r"[^A-Za-z0-9.+-]+")


class SweptKey(NamedTuple):
    """A key of the configuration, and the values that it is given one after the other."""

    key: str
    values: tuple[Value, ...]

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def is_numeric(self) -> bool:
        """Whether its values have places on an axis."""
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)


class GridPoint(NamedTuple):
    """One value of each swept key."""

    values: tuple[tuple[SweptKey, Value], ...]

    @property
    def overrides(self) -> list[str]:
        """The values as on the command line."""
        return [f"{swept.key}={json.dumps(value)}" for swept, value in self.values]

    @property
    def name(self) -> str:
        """The values for a reader."""
        return ", ".join(f"{swept.name} {shown(value)}" for swept, value in self.values)

    @property
    def folder(self) -> str:
        """The values as the name of a folder."""
        return ",".join(f"{s.name}={_ODD.sub('_', shown(value))}" for s, value in self.values)

    def without(self, key: str) -> tuple[tuple[SweptKey, Value], ...]:
        """Return the values of all other keys."""
        return tuple(each for each in self.values if each[0].key != key)


def read_sweep(text: str) -> SweptKey:
    """Return what `KEY=a,b,c` asks for.

    Raises:
        ConfigError: it is of another form.
    """
    key, _, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = []
    if not key or not isinstance(found, list) or len(found) < 2:
        raise ConfigError(f"--sweep {text}: must be KEY=VALUE,VALUE,..., of at least 2 values")
    found = [_number(value) for value in found]
    if any(isinstance(value, list | dict) for value in found):
        raise ConfigError(f"--sweep {text}: must have plain values, no lists and no mappings")
    if len({shown(value) for value in found}) < len(found):
        raise ConfigError(f"--sweep {text}: must have different values")
    return SweptKey(key, tuple(found))


def _number(value: Value) -> Value:
    """Return what is meant as a number, such as 1e-3, which is a text in YAML 1.1."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def grid(sweeps: Sequence[SweptKey]) -> list[GridPoint]:
    """Return every combination of values; without sweeps the one point without any.

    Raises:
        ConfigError: a key is swept twice, or two points would have one folder.
    """
    keys = [swept.key for swept in sweeps]
    if len(set(keys)) < len(keys):
        raise ConfigError("--sweep: a key must be swept once; name all of its values there")
    columns = [[(swept, value) for value in swept.values] for swept in sweeps]
    points = [GridPoint(values) for values in itertools.product(*columns)]
    folders = [point.folder for point in points]
    if len(set(folders)) < len(folders):
        raise ConfigError("--sweep: values differ in nothing that a folder's name could hold")
    return points


def shown(value: Value) -> str:
    """Return a value for a reader."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
