"""Configuration: a dataclass filled from defaults, a YAML file, the environment and `key=value`.

Generic: which keys there are is decided by the dataclass of whoever is being configured. Each later
source wins over the ones before it; mappings are laid over each other key by key.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class ServeConfig:
        port: int = 5555
        '''Port of the one socket that devices see.'''

    config = load_config(ServeConfig, "serve.yaml", overrides=["port=6000"])
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from edge_sdk.config.sources import read_layers
from edge_sdk.config.values import Spot, build

SECRET: Mapping[str, object] = MappingProxyType({"secret": True})
"""`field(metadata=SECRET)` keeps a value out of error messages and, on request, out of dumps."""

T = TypeVar("T")


def load_config(
    cls: type[T],
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    env: Mapping[str, str] = os.environ,
    env_prefix: str = "EDGE_SDK_",
    ignore: Collection[str] = (),
) -> T:
    """Return a *cls*, its defaults overlaid with *file*, then *env*, then *overrides*.

    Args:
        cls: A keyword-only frozen dataclass. Fields may be str, int, float, bool, Path, Literal,
            `X | None`, `tuple[X, ...]`, `dict[str, X]` or such a dataclass again.
        file: YAML; its relative paths start from its own folder.
        overrides: `dotted.key=value`, the value as YAML.
        env: Variables such as `EDGE_SDK_DATA__PATH`; two underscores descend one level.
        env_prefix: How the variables that concern us begin.
        ignore: Full names of variables with that prefix that are no setting.

    Raises:
        ConfigError: In one line: where, which key, which value, and what is allowed.
    """
    config: T = build(cls, read_layers(file, overrides, env, env_prefix, ignore), Spot(""))
    return config
