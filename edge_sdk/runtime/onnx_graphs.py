"""The graphs that a device without torch runs, in the one part in which they travel.

Blocks of the same kind share their graphs: names inside them are those inside a block, and no
weight lies in them. What writes them is `coordinator/onnx_export/export.py`, what runs them
`onnx_runtime.py`; what they may be says `onnx_rules.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edge_sdk.errors import ModelError, one_line
from edge_sdk.runtime.onnx_rules import RefusedGraph, checked_model

PART_NAME = "graphs"
ABOUT = "about"
# Before the names of a block's graphs: those for weights with the residual inside, without inputs
# for it. Earlier versions of the SDK do not know them and use the others.
FOLDED = "folded."
_NAME = re.compile(rf"front|tail|(?:{re.escape(FOLDED)})?(?:block|vjp|measure)\.[0-9]{{1,5}}")
TRANSPOSED = "transposed"
"""A list of the targets whose weights lie as (inputs, outputs), as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """How the graphs of one slice belong together."""

    blocks_path: str
    """Module path of the block list."""
    kinds: tuple[int, ...]
    """Which graphs each block 0 .. split-1 uses: `block.<kind>`, `vjp.<kind>`, `measure.<kind>`."""
    task: str
    """`causal-lm` or `sequence-classification`."""
    head: tuple[str, ...]
    """Parameters of the tail that are trained, by whole-model name."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """ONNX models by name: `front`, `block.<kind>`, `vjp.<kind>`, `measure.<kind>`, `tail`.

    Those of blocks are there again after `FOLDED`.
    """

    about: About
    models: Mapping[str, bytes]

    @property
    def can_fold(self) -> bool:
        """Whether there are graphs for weights with the residual inside."""
        return TRANSPOSED in self.models

    def programs(self) -> dict[str, bytes]:
        """Return the ONNX models alone."""
        return {name: data for name, data in self.models.items() if name != TRANSPOSED}

    def transposed(self) -> frozenset[str]:
        """Return the targets whose weights lie as (inputs, outputs), by module name.

        Raises:
            ModelError: the list is damaged.
        """
        try:
            return frozenset(map(str, json.loads(self.models[TRANSPOSED])))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the graphs' list of weights: {one_line(error)}") from error

    def pack(self) -> bytes:
        """Return the bytes of a safetensors file, the same for the same graphs."""
        from safetensors.numpy import save

        files = {**self.models, ABOUT: json.dumps(asdict(self.about), sort_keys=True).encode()}
        packed: bytes = save({n: np.frombuffer(files[n], np.uint8) for n in sorted(files)})
        return packed


def read_graphs(path: Path) -> Graphs:
    """Read what `pack` has written, and look at every graph before any library does.

    Raises:
        ModelError: the file holds no graphs, or one that our exporter does not write.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        files = {name: value.tobytes() for name, value in load_file(path).items()}
        about = json.loads(files.pop(ABOUT))
        lists = {name: tuple(about[name]) for name in ("kinds", "head")}
        graphs = Graphs(About(**{**about, **lists}), files)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} holds no graphs: {one_line(error)}") from error
    for name, data in graphs.programs().items():
        _check(name, data)
    return graphs


def _check(name: str, data: bytes) -> None:
    if not _NAME.fullmatch(name):
        raise RefusedGraph("among the graphs is one of a name that edgesplit never has")
    try:
        checked_model(data)
    except ModelError as error:
        raise RefusedGraph(
            f"graph {name!r} is refused, as edgesplit's exporter does not write such: {error}"
        ) from None
