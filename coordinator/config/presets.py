"""Published methods as configurations: `serve --preset NAME`, or `preset: NAME` in the file.

A preset is a part of a ServeConfig, in `presets/`, that lies under whatever the user says. Its
settings make the run that method, so a user who contradicts one is told; the exceptions stand
below. It knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar, get_args

from coordinator.config.run import Preset, ServeConfig
from edge_sdk.config.sources import (
    Entries,
    Leaf,
    Node,
    Origin,
    Text,
    from_overrides,
    parse_text,
    read_layers,
)
from edge_sdk.config.values import Spot, build
from edge_sdk.errors import ConfigError

NAMES: tuple[str, ...] = get_args(Preset)
ENV_PREFIX = "COORDINATOR_"

C = TypeVar("C", bound=ServeConfig)

_FOLDER = Path(__file__).with_name("presets")

# Values that are other readings of the same method.
_ALSO: Mapping[tuple[str, str], tuple[object, ...]] = {
    ("hsplitlora", "planning.split"): ("memory",),
    ("hsplitlora", "aggregation"): ("exact", "stack"),
    ("hlora", "planning.ranks"): ("uniform",),
    ("hlora", "aggregation"): ("svd-balanced",),
    ("hetlora", "planning.ranks"): ("uniform",),
}
# What a method leaves open, and the values that would still make it another method.
_OPEN: Mapping[tuple[str, str], tuple[object, ...]] = {
    ("splitlora", "default.split"): ("all",),
    ("ft", "training.learning_rate"): (),
}


def load_serve_config(
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    env: Mapping[str, str] = os.environ,
    *,
    preset: str | None = None,
) -> ServeConfig:
    """Return the config of a run; see `load_with_preset`."""
    return load_with_preset(ServeConfig, file, overrides, env, preset=preset)


def load_with_preset(
    cls: type[C],
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    env: Mapping[str, str] = os.environ,
    *,
    preset: str | None = None,
) -> C:
    """Return a *cls*, its preset under *file*, *env* and *overrides*.

    Args:
        cls: `ServeConfig`, or one that has more fields.
        file: YAML; its relative paths start from its own folder.
        overrides: `dotted.key=value`, the value as YAML.
        env: Variables that begin with `COORDINATOR_`.
        preset: One of `NAMES`; wins over a `preset` in the file.

    Raises:
        ConfigError: as `load_config`; or a setting contradicts the preset.
    """
    layers = read_layers(file, overrides, env, ENV_PREFIX)
    if preset is not None:
        layers += from_overrides([f"preset={preset}"])
    name = _chosen(layers)
    if name not in NAMES:  # none; or a word that the config itself refuses
        return _build(cls, layers)
    # As text and not as a file: an error names the preset, and no folder where it is installed.
    below = parse_text(Text(preset_text(name), Origin(f"preset {name!r}")))
    config = _build(cls, [below, *layers])
    _refuse_contradictions(name, below, config, layers)
    return config


def preset_text(name: str) -> str:
    """Return the YAML of a preset.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(NAMES)}")
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def preset_title(name: str) -> str:
    """Return what a preset is, on one line: the first comment of its file."""
    return preset_text(name).splitlines()[0].removeprefix("# ")


def _build(cls: type[C], layers: list[Node]) -> C:
    config: C = build(cls, layers, Spot(""))
    return config


def _chosen(layers: list[Node]) -> str:
    """Return the name that the last layer with a `preset` gives; empty if none does."""
    node = _last(layers, ("preset",))
    if isinstance(node, Text):
        node = parse_text(node)
    return str(node.value) if isinstance(node, Leaf) and node.value is not None else ""


def _last(layers: Iterable[Node], path: tuple[str, ...]) -> Node | None:
    """Return the strongest layer's setting at *path*."""
    found = [node for layer in layers if (node := _at(layer, path)) is not None]
    return found[-1] if found else None


def _at(node: Node, path: tuple[str, ...]) -> Node | None:
    if not path:
        return node
    if isinstance(node, Text):
        node = parse_text(node)
    below = node.entries.get(path[0]) if isinstance(node, Entries) else None
    return None if below is None else _at(below, path[1:])


def _refuse_contradictions(name: str, below: Node, config: ServeConfig, layers: list[Node]) -> None:
    """Hold *config* against what the preset says, key by key."""
    meant = _build(ServeConfig, [below, *from_overrides(["model=any"])])
    for key in _keys(below):
        wanted = _value(meant, key)
        for place, found in _settings(config, key):
            if _is_allowed(name, key, wanted, found):
                continue
            node = _last(layers, tuple(place.split(".")))
            where = f"{node.origin.where}: " if node is not None else ""
            raise ConfigError(
                f"{where}{place} must {_demand(name, key, wanted)} with preset {name!r}, "
                f"got {found!r}; leave it out or choose another preset"
            )


def _is_allowed(name: str, key: str, wanted: object, found: object) -> bool:
    if (name, key) in _OPEN:
        return found not in _OPEN[name, key]
    return found == wanted or found in _ALSO.get((name, key), ())


def _demand(name: str, key: str, wanted: object) -> str:
    if (name, key) in _OPEN:
        return f"not be {' or '.join(map(repr, _OPEN[name, key]))}"
    return f"be {' or '.join(map(repr, (wanted, *_ALSO.get((name, key), ()))))}"


def _settings(config: ServeConfig, key: str) -> Iterator[tuple[str, object]]:
    """Return the setting of *key*; where it is a default, also what single devices have."""
    yield key, _value(config, key)
    group, _, field = key.partition(".")
    for device, own in config.devices.items() if group == "default" else ():
        if getattr(own, field) is not None:
            yield f"devices.{device}.{field}", getattr(own, field)


def _keys(node: Node, path: str = "") -> Iterator[str]:
    """Return the dotted keys of all single values below *node*."""
    if not isinstance(node, Entries):
        yield path
        return
    for key, below in node.entries.items():
        yield from _keys(below, f"{path}.{key}" if path else key)


def _value(config: ServeConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
