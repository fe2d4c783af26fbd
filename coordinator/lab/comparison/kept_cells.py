"""The runs of a comparison that have ended, in a file that outlives it.

A run is the one that is asked for if its configuration, the bytes of its data and the version of
EdgeSplit are; another one stays in the file and is told apart by its digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from coordinator.config.run import ServeConfig
from coordinator.lab.comparison.cells import RunResult, cell_from_row, cell_to_row
from coordinator.lab.comparison.config import CompareConfig
from coordinator.lab.simulation.config import SimulatedDeviceConfig, SimulationConfig
from coordinator.results.run_folder import RunFolder, digest_of
from edge_sdk.config.describe import dump_config
from edge_sdk.files import storage_errors
from edge_sdk.transport.link import package_version

CELLS, CONFIG = "cells.jsonl", "comparison.yaml"
# Raised when what a cell holds is another thing.
FORMAT = 2
MOST_CHANGES = 5
# Where a coordinator would listen and keep things: no simulated run's result depends on it.
PLACES: dict[str, Any] = {
    field.name: field.default
    for field in fields(ServeConfig)
    if field.name in ("listen", "secret_key", "allow_list", "runs", "name")
}


class KeptCells:
    """What is kept in the folder of a comparison."""

    def __init__(self, out: Path) -> None:
        self._out, self._folder = out, RunFolder(out)

    def find(self, method: str, digest: str) -> tuple[RunResult, float] | None:
        """Return a run that has ended and the seconds that it took."""
        for row in self._rows():
            if row["digest"] == digest and row["method"] == method:
                return cell_from_row(row), row["took_s"]
        return None

    def append(self, cell: RunResult, digest: str, took_s: float) -> None:
        """Keep a run that has ended."""
        row = {**cell_to_row(cell), "digest": digest, "took_s": round(took_s, 3)}
        self._folder.append(CELLS, {**row, **_marks()})

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Return the rows that this version has written."""
        marks = _marks()
        for row in self._folder.rows(CELLS):
            if {name: row.get(name) for name in marks} == marks:
                yield row

    def num_old(self) -> int:
        """Return how many rows another version has written."""
        return len(self._folder.rows(CELLS)) - len(list(self._rows()))

    def changes(self, config: CompareConfig) -> list[str]:
        """Return what differs from the comparison that ran here last, and remember this one."""
        file, text = self._out / CONFIG, dump_config(config)
        with storage_errors(self._out):
            self._out.mkdir(parents=True, exist_ok=True)
            before = file.read_text(encoding="utf-8") if file.is_file() else text
            file.write_text(text, encoding="utf-8")
        old, new = yaml.safe_load(before), yaml.safe_load(text)
        return differences({**old, **dict.fromkeys(PLACES)}, {**new, **dict.fromkeys(PLACES)})


def _marks() -> dict[str, Any]:
    return {"format": FORMAT, "edgesplit": package_version()}


def digest_of_run(config: SimulationConfig) -> str:
    """Return a digest that is equal for runs with the same configuration and the same data.

    To a method without devices all devices are alike: only their data and batches count.
    """
    if config.trained_by == "coordinator":
        fleet = config.simulation
        own = {name: SimulatedDeviceConfig(data=d.data) for name, d in fleet.devices.items()}
        settings = {n: replace(d, split=None, r=None) for n, d in config.devices.items()}
        config = replace(config, simulation=replace(fleet, devices=own), devices=settings)
    fleet = config.simulation
    files = (device.data for device in fleet.devices.values())
    plain = replace(config.unwatched(), **PLACES)
    return digest_of(plain, (fleet.data.path, config.evaluation.data.path, *files))


def differences(before: object, after: object) -> list[str]:
    """Return each setting that differs, by its dotted key, with both values; None: not set."""
    old, new = dict(_flat(before)), dict(_flat(after))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _flat(below, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
