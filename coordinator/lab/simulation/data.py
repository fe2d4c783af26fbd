"""The private data of simulated devices: one file dealt out, or a file for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig
from coordinator.lab.simulation.sharding import (
    IntArray,
    contiguous_shards,
    dirichlet_shards,
    iid_shards,
    length_classes,
)
from edge_sdk.data.readers import read_records
from edge_sdk.data.rows import DataConfig, Row, load_rows
from edge_sdk.data.schemas import WORDS
from edge_sdk.errors import ConfigError

# Texts without a class are sorted into so many classes by their length.
LENGTH_CLASSES = 10

Records = list[Mapping[str, Any]]


def deal(
    fleet: FleetConfig, devices: Mapping[str, SimulatedDeviceConfig], seed: int
) -> dict[str, Records]:
    """Return the rows of each device that has no file of its own; a pure function of the seed.

    Raises:
        ConfigError: there is nothing to deal out, or less than one row for each.
        DataError: the file is malformed; the message names file and line.
    """
    names = [name for name, device in devices.items() if device.data is None]
    if not names:
        return {}
    if fleet.data.path is None:
        raise ConfigError(
            "simulation.data.path: names no training data; give it, or `data` for each device"
        )
    rows = load_rows(None, fleet.data)  # finds errors while lines still have numbers
    if len(rows) < len(names):
        raise ConfigError(f"simulation.data: {len(rows)} rows for {len(names)} devices")
    wanted = set(fleet.data.columns.values()) or set(WORDS)
    numbered = read_records(fleet.data.path, wanted, fleet.data.name, fleet.data.split)
    used = {row.where for row in rows}
    records = list(islice((record for where, record in numbered if where in used), len(used)))
    shards = _shards(fleet, rows, len(names), seed)
    return {name: [records[i] for i in shard] for name, shard in zip(names, shards, strict=True)}


def own_data(fleet: FleetConfig, device: SimulatedDeviceConfig) -> DataConfig:
    """Return how a device reads its data; rows that were dealt out have no path and no limit."""
    limit = fleet.data.limit if device.data is not None else None
    return replace(fleet.data, path=device.data, limit=limit)


def _shards(fleet: FleetConfig, rows: Sequence[Row], count: int, seed: int) -> list[IntArray]:
    if fleet.shards == "contiguous":
        return contiguous_shards(len(rows), count)
    if fleet.shards == "iid":
        return iid_shards(len(rows), count, seed)
    return dirichlet_shards(_classes(rows), count, fleet.alpha, seed)


def _classes(rows: Sequence[Row]) -> IntArray:
    """Return the class of each row: its label, or its quantile of length."""
    if rows[0].schema == "label":
        labels = [str(row.label) for row in rows]
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)
    return length_classes([_num_letters(row) for row in rows], LENGTH_CLASSES)


def _num_letters(row: Row) -> int:
    turns = sum(len(str(turn.get("content", ""))) for turn in row.messages)
    return len(row.text) + len(row.prompt) + len(row.completion) + turns
