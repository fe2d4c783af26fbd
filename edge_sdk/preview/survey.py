"""What a run would make of a data set: samples as tokens, lengths, and rows that do not fit.

Reads and tokenises as a run does, but goes on behind a row at which a run would stop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.client.config import ClientConfig
from edge_sdk.data.readers import source_name
from edge_sdk.data.rows import DataConfig, Row, load_rows
from edge_sdk.data.tally import Tally
from edge_sdk.data.tokenize import Example, ModelLimits, tokenize_rows
from edge_sdk.errors import ConfigError, ModelError, one_line
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.weights import load_tokenizer, locate

# What configurations call the longest sequence of a model.
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found in one data set."""

    name: str
    """The data set, as messages call it."""
    config: DataConfig
    """How a run would read it."""
    schemas: dict[str, int]
    """Rows by the name of their schema."""
    is_whole: bool
    """Whether all rows were looked at."""
    examples: list[Example]
    """Samples that a run would train on."""
    lengths: list[int]
    """Tokens of every sample before any was cut or dropped."""
    max_length: int | None
    """Tokens of the longest sequence that may stay; None: any length."""
    tally: Tally
    """What became of the others."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, where labels have names."""

    @property
    def stops(self) -> bool:
        """Whether a run would stop at one of these rows."""
        return bool(
            (self.tally.count("skipped") and self.config.bad_rows == "refuse")
            or (self.tally.count("dropped") and self.config.too_long == "refuse")
        )


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The tokenizer of a model, and what its config says of lengths."""

    tokenizer: Any
    limits: ModelLimits
    origin: str
    """Where it comes from, for a person."""


def find_model(config: ClientConfig, model: str | None) -> Reader:
    """Return the tokenizer of *model*, else of the config's, else of the last run on this device.

    Raises:
        ConfigError: nothing says which model, and no run has left one here.
        ModelError: it is not there, or has no tokenizer that can be read.
    """
    folder = _folder(config, model)
    tokenizer: Any
    if config.backend == "onnxruntime" or find_spec("transformers") is None:
        from edge_sdk.data.fast_tokenizer import PlainTokenizer

        tokenizer, library = PlainTokenizer(folder), "tokenizers"
    else:
        tokenizer, library = load_tokenizer(folder), "transformers"
    settings = _settings(folder)
    positions = next((settings[key] for key in POSITIONS if key in settings), None)
    limits = ModelLimits(
        vocab_size=max(int(settings.get("vocab_size", 0)), len(tokenizer)),
        max_positions=positions if isinstance(positions, int) and positions > 1 else None,
    )
    return Reader(tokenizer=tokenizer, limits=limits, origin=f"{folder} (by {library})")


def _folder(config: ClientConfig, model: str | None) -> Path:
    wanted = model or config.model
    if wanted is not None:
        folder = Path(wanted).expanduser()
        return folder if folder.is_dir() else locate(wanted)
    left = PartCache(config.cache).folder.glob("*.files")
    folders = sorted(left, key=lambda path: path.stat().st_mtime)
    if not folders:
        raise ConfigError(
            "--model: names no model, and no run has left its tokenizer here yet; "
            "give a folder with tokenizer.json, or a Hugging Face id"
        )
    return folders[-1]


def _settings(folder: Path) -> dict[str, Any]:
    """Return what the model's config says of its text part."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        return {}
    inner = found.get("text_config")
    return {**found, **inner} if isinstance(inner, dict) else found


def survey(config: DataConfig, reader: Reader, most_rows: int) -> Survey:
    """Look at the first *most_rows* rows of what *config* names.

    Raises:
        DataError: The data cannot be read, or not one of its rows can be used.
        ConfigError: No path is given, or the lengths that are asked for are too long.
    """
    lenient = replace(
        config,
        bad_rows="skip",
        too_long="drop" if config.too_long == "refuse" else config.too_long,
        limit=min(config.limit or most_rows, most_rows),
    )
    tally = Tally("skip")
    rows = load_rows(None, lenient, tally)
    limits, classes = reader.limits, config.labels or _classes(rows)
    if classes:
        limits = replace(limits, label_names=classes, num_labels=len(classes))
    examples = tokenize_rows(rows, reader.tokenizer, lenient, limits, tally)
    return Survey(
        name=source_name(config.path or ""),
        config=config,
        schemas=dict(tally.schemas),
        is_whole=len(rows) < most_rows,
        examples=examples,
        lengths=list(tally.lengths),
        max_length=config.max_length or limits.max_positions,
        tally=tally,
        classes=tuple(classes),
    )


def _classes(rows: list[Row]) -> tuple[str, ...]:
    """Return the names of classes that the data uses: a run brings its own list."""
    labels = {row.label for row in rows if isinstance(row.label, str)}
    return tuple(sorted(labels)) if not all(label.isdecimal() for label in labels) else ()


def num_with_loss(example: Example) -> int:
    """Return how many tokens of a sample carry loss; a class is one."""
    if isinstance(example.labels, int):
        return 1
    # Nothing predicts the first token.
    return int(np.count_nonzero(example.labels[1:] >= 0))
