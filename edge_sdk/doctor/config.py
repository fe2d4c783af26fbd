"""Checks of what the owner of a device has written: its config, its keys, its data.

Not here: whether anybody answers at the address in it (`link.py`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path

from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.config.sources import Entries, Node, from_overrides, read_layers
from edge_sdk.config.values import Spot, build, by_key, default_of, field_types, type_words
from edge_sdk.data.paths import data_files
from edge_sdk.data.readers import source_name
from edge_sdk.data.rows import DataConfig, load_data
from edge_sdk.data.tally import Tally
from edge_sdk.doctor.finding import Finding, failure, ok, skipped
from edge_sdk.errors import ConfigError, EdgeError, one_line
from edge_sdk.transport.keys import fingerprint, load_key_pair, load_public_key

# Enough to find a wrong column or a broken file; a run reads all of them.
MOST_ROWS = 1000


def read_config(
    file: Path | None, overrides: Iterable[str], env: Mapping[str, str], env_prefix: str
) -> tuple[ClientConfig | None, Finding]:
    """Return the config, if it is one, and everything that is wrong with it."""
    overrides = list(overrides)
    try:
        config = load_config(ClientConfig, file, overrides, env, env_prefix)
    except ConfigError as error:
        try:
            wrong = _all_wrong(read_layers(file, overrides, env, env_prefix))
        except ConfigError:
            wrong = []
        text = "; ".join(wrong) or one_line(error)
        return None, failure("config", text, "correct it; every key: docs/configuration.md")
    return config, ok("config", f"{file or 'given on the command line'}: every key is known")


def _all_wrong(layers: list[Node]) -> list[str]:
    """Return what is wrong with each key by itself; `load_config` stops at the first."""
    needed = [one.name for one in fields(ClientConfig) if default_of(one) is MISSING]
    stand_ins = from_overrides([f"{name}=tcp://x:1" for name in needed])
    given = by_key(ClientConfig, layers, Spot(""))
    wrong = []
    for key, nodes in given.items():
        alone: list[Node] = [Entries({key: node}, node.origin) for node in nodes]
        try:
            build(ClientConfig, [*stand_ins, *alone], Spot(""))
        except ConfigError as error:
            wrong.append(one_line(error))
    types = field_types(ClientConfig)
    missing = [f"{n} is missing; it must be {type_words(types[n])}" for n in needed]
    return wrong + [text for name, text in zip(needed, missing, strict=True) if name not in given]


def check_keys(secret_key: Path, server_key: str) -> Finding:
    """Check whether both keys are there, are keys, and the secret one is secret."""
    try:
        mode = stat.S_IMODE(secret_key.stat().st_mode)
    except FileNotFoundError:
        cure = f"edge-sdk keygen {secret_key}, then register its public half"
        return failure("keys", f"no secret key at {secret_key}", cure)
    except OSError as error:
        text = f"{secret_key}: {error.strerror}"
        return failure("keys", text, f"sudo chown $USER {secret_key.parent} {secret_key}")
    if mode & 0o077:
        text = f"{secret_key} has mode {mode:04o}: others can read it, so it is no secret"
        return failure("keys", text, f"chmod 600 {secret_key}")
    try:
        ours = load_key_pair(secret_key).public
    except ConfigError as error:
        cure = f"edge-sdk keygen to another file, and secret_key=FILE ({secret_key} is kept)"
        return failure("keys", one_line(error), cure)
    try:
        theirs = load_public_key(server_key)
    except ConfigError as error:
        cure = "copy coordinator.key.pub from the coordinator, and server_key=FILE"
        return failure("keys", f"server_key: {one_line(error)}", cure)
    if ours == theirs:
        text = "server_key is this device's own public key, not the coordinator's"
        return failure("keys", text, "server_key=coordinator.key.pub")
    shown = f"this device {fingerprint(ours)}, coordinator {fingerprint(theirs)}"
    return ok("keys", f"{shown}; mode {mode:04o}")


def check_data(config: DataConfig, most_rows: int | None = MOST_ROWS) -> Finding:
    """Check by its first rows, or by all, whether the data can be read; nothing of it is shown."""
    if config.path is None:
        return skipped("data", "data.path is empty: the application hands its own rows over")
    name, limits = source_name(config.path), [n for n in (config.limit, most_rows) if n]
    limit = min(limits, default=None)
    try:
        if not data_files(config.path, config.split) and not os.path.isdir(name):
            return skipped("data", f"{name} is no file: a data set, fetched when a run begins")
        tally = Tally(config.bad_rows)
        rows, held_out = load_data(None, replace(config, limit=limit), 0, tally)
    except EdgeError as error:
        cure = "`edge-sdk data preview` shows such rows; or data.path=FILE"
        return failure("data", one_line(error), cure)
    except ModuleNotFoundError as error:
        return failure("data", one_line(error), "pip install 'edgesplit[data]'")
    is_part = limit is not None and len(rows) + len(held_out) >= limit
    extent = f"the first {limit} rows are" if is_part else "all rows are"
    count = f"{len(rows)} to train, {len(held_out)} to validate"
    if skipped_rows := tally.count("skipped"):
        count += f"; {skipped_rows} skipped, first {tally.first('skipped')[0]}"
    return ok("data", f"{name}: {extent} of the schema {rows[0].schema}; {count}")
