"""Hashes of a model's parts, kept from one start to the next while its files look the same.

Whoever serves a model, or checks that its own is the same, would otherwise read all of it each
time. Knows no network.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.model.kept.findings import Clock, Findings, is_settled
from edge_sdk.protocol.plan import Part

if TYPE_CHECKING:
    from edge_sdk.model.weights import ModelSource

# What the bytes of a part depend on, beside the files and our own code.
WRITERS = ("safetensors", "tokenizers", "torch", "transformers")


class PartHashes:
    """Describes the parts of one model as `ModelSource.describe` does, and remembers."""

    def __init__(self, source: ModelSource, folder: Path, clock: Clock = time.time) -> None:
        """Take up what is known of *source*.

        Args:
            source: The model, whose missing tensors have been drawn.
            folder: Where hashes are kept; a file for each model folder and task.
            clock: Tells whether a file is too new to be known by its looks.
        """
        self._source = source
        place = hashlib.sha256(f"{source.folder.resolve()} {source.task}".encode()).hexdigest()
        self._findings = Findings(folder / f"{place}.hashes.json", clock)
        self._about: dict[str, Any] = {"looks": dict(source.looks), "writers": _writers(source)}
        self._is_settled = is_settled(source.looks, clock())
        kept = self._findings.read()
        is_same = all(kept.get(key) == value for key, value in self._about.items())
        self._known: dict[str, list[Any]] = kept["parts"] if is_same else {}

    def describe(self, name: str) -> Part:
        """Return name, hash and size of part *name*; it is read only where they are not known."""
        if name in self._known:
            sha256, num_bytes = self._known[name]
            return Part(name=name, sha256=sha256, num_bytes=num_bytes)
        found = self._source.describe(name)
        is_same = self._source.looks_now() == self._source.looks
        if is_same and self._is_settled and self._is_of_files(name):
            self._known[name] = [found.sha256, found.num_bytes]
            self._findings.write({**self._about, "parts": self._known})
        return found

    def forget(self) -> None:
        """Forget every part: one of them was found to be another one than it looked like."""
        self._known = {}
        self._findings.write({**self._about, "parts": {}})

    def _is_of_files(self, name: str) -> bool:
        """Return whether a part comes from the files alone, and no head was drawn for it."""
        return name == "files" or not set(self._source.drawn) & set(self._source.layout.part(name))


def _writers(source: ModelSource) -> str:
    """Return one hash of everything but the files that the bytes of parts depend on."""
    versions = [importlib.metadata.version(name) for name in WRITERS]
    subject = json.dumps([source.config.to_json_string(), source.task, versions])
    digest = hashlib.sha256(subject.encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
