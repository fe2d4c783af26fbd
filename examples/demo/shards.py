"""The demo's data: made, or somebody's own; dealt out to devices, with a file to evaluate on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ROOT

from coordinator.lab.simulation.sharding import contiguous_shards, iid_shards
from edge_sdk.data.paths import kind_of
from edge_sdk.data.rows import DataConfig, Row, hold_out, load_rows
from edge_sdk.data.schemas import SCHEMAS
from edge_sdk.errors import ConfigError, DataError

# Evaluated after every round, so not too many; spread over the whole file.
DEV_ROWS = 120
SEED = 0


@dataclass(frozen=True)
class Shards:
    """Files, and how they are read."""

    train: list[Path]
    dev: Path
    sizes: list[int]
    data: dict[str, Any]
    """Settings of `data` that coordinator and devices share."""
    task: str
    label_names: tuple[str, ...]
    sample: Row
    """A row of the evaluation file, to be completed before and after."""
    end: str
    """What a completion ends with; empty: the end-of-text token."""


def make_shards(
    out: Path, paths: list[Path], columns: str, num_shards: int, how: str, is_base: bool
) -> Shards:
    """Write one training file for each device and a file to evaluate on, below *out*.

    Raises:
        ConfigError: the paths or columns make no sense.
        DataError: the data is malformed.
    """
    # The small model cannot learn its end-of-text token by LoRA (see its README): a line end does.
    end = "\n" if is_base else ""
    if paths:
        train, dev = _own(paths, columns)
    else:
        raw = out / "sample"
        script = ROOT / "examples" / "data" / "make_sample.py"
        command = [sys.executable, str(script), "--out", str(raw), "--shards", str(num_shards)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        # Sorted by kind of trip already: contiguous shards differ, as those of real devices do.
        files = [raw / f"shard-{i}.jsonl" for i in range(num_shards)]
        train = [row for file in files for row in load_rows(file, DataConfig())]
        dev = load_rows(raw / "dev.jsonl", DataConfig())
    if len(train) < 2 * num_shards:
        raise DataError(f"{len(train)} samples are too few for {num_shards} devices")
    deal = contiguous_shards(len(train), num_shards)
    if how == "iid":
        deal = iid_shards(len(train), num_shards, SEED)
    dev = dev[:: max(1, len(dev) // DEV_ROWS)][:DEV_ROWS]
    names = _label_names([*train, *dev])
    files = [
        _write(out / f"shard-{i + 1}.jsonl", [train[j] for j in d], end) for i, d in enumerate(deal)
    ]
    return Shards(
        train=files,
        dev=_write(out / "dev.jsonl", dev, end),
        sizes=[len(d) for d in deal],
        data={"append_eos": not end, "too_long": "cut"} | ({"labels": names} if names else {}),
        task="sequence-classification" if train[0].schema == "label" else "causal-lm",
        label_names=tuple(names),
        sample=min(dev, key=lambda row: len(row.prompt)),
        end=end,
    )


def _own(paths: list[Path], columns: str) -> tuple[list[Row], list[Row]]:
    """Read somebody's own files; without one to evaluate on, hold some rows out."""
    try:
        pairs = dict(pair.split("=", 1) for pair in columns.split(",") if pair)
        config = DataConfig(columns=pairs)
    except ValueError as error:
        raise ConfigError(f"--columns {columns!r}: {error}") from error
    files = _files(paths)
    dev_files = [f for f in files if f.name.lower().startswith(("dev", "val", "eval"))]
    train_files = [f for f in files if f not in dev_files]
    if not train_files:
        raise ConfigError(f"--data {' '.join(map(str, paths))}: no file to train on")
    train = [row for file in train_files for row in load_rows(file, config)]
    dev = [row for file in dev_files for row in load_rows(file, config)]
    if not dev:
        train, dev = hold_out(train, 0.05, SEED)
    return train, dev


def _files(paths: list[Path]) -> list[Path]:
    """Files that are named, and those of folders that are named, tests left out."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if kind_of(p) is not None)
        found += [p for p in inside if not p.name.lower().startswith("test")]
    return found


def _label_names(rows: Sequence[Row]) -> list[str]:
    labels = {row.label for row in rows if row.label is not None}
    if all(isinstance(label, int) for label in labels):
        highest = max((int(label) for label in labels), default=-1)
        return [str(number) for number in range(highest + 1)]
    return sorted(map(str, labels))


def _write(path: Path, rows: Sequence[Row], end: str) -> Path:
    """Write *rows* as JSON Lines under our own column names."""
    lines = []
    for row in rows:
        values = {word: getattr(row, word) for word in SCHEMAS[row.schema]}
        if row.asked:
            turns = values.pop("messages")
            values |= {"prompt": turns[: row.asked], "completion": turns[row.asked :]}
        values |= {"tools": row.tools} if row.tools else {}
        if end and row.schema == "completion":
            values["completion"] = values["completion"].strip() + end
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path
