"""The result as an adapter for llama.cpp, made by llama.cpp's own converter.

The converter is no package: it is looked for, started as a program, and what it writes is read back
by the `gguf` package.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.export.adapter import has_transposed, least_ranks, write_files
from coordinator.export.card import Card
from coordinator.export.check import TOLERANCE, ExportError
from coordinator.export.facts import RunFacts
from coordinator.export.peft_names import pad
from edge_sdk.errors import ModelError, one_line
from edge_sdk.files import storage_errors
from edge_sdk.lora.factors import Factors, norm
from edge_sdk.model.weights import ModelSource

ADAPTER_FILE = "adapter.gguf"
MODELFILE = """\
# For `ollama create NAME -f Modelfile`, in this folder. base.gguf: the base model as llama.cpp's
# convert_hf_to_gguf.py makes it; the adapter fits no other model.
FROM ./base.gguf
ADAPTER ./adapter.gguf
"""


def export_gguf(
    source: ModelSource,
    learned: Mapping[str, Factors],
    folder: Path,
    converter: Path,
    facts: RunFacts | None = None,
) -> float:
    """Write *learned* as an adapter for llama.cpp.

    llama.cpp divides one alpha by a tensor's own rank: all weights get the same rank, and alpha is
    equal to it.

    Returns:
        By how much the size of all changes, read back, differs from what was learned; relative.
        The converter names, turns and cuts weights as llama.cpp has them, which leaves it alone.

    Raises:
        ModelError: the converter does not know the model, or does not convert its adapters.
        ExportError: the adapter, read back, is another one.
        StorageError: the folder cannot be written.
    """
    if has_transposed(source):
        raise ModelError(
            f"--format gguf: {source.config.model_type} keeps its weights transposed, and "
            "llama.cpp's converter turns its adapters the wrong way; use --format merged"
        )
    kept = least_ranks(learned)
    rank = max(factors.rank for factors in kept.values())
    padded = {name: pad(factors, rank) for name, factors in kept.items()}
    card = Card(source=source, format="gguf", ranks=dict.fromkeys(kept, rank), facts=facts)
    with storage_errors(f"adapter {folder}"), tempfile.TemporaryDirectory() as scratch:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(card, padded, {}, Path(scratch), is_uniform=True)
        _convert(converter, Path(scratch), source, folder / ADAPTER_FILE)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        (folder / "Modelfile").write_text(MODELFILE, encoding="utf-8")
    wanted = math.sqrt(sum(norm(factors) ** 2 for factors in kept.values()))
    found = _size(folder / ADAPTER_FILE)
    difference = abs(found - wanted) / wanted if wanted else found
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{folder / ADAPTER_FILE}: read back, its changes are of size {found:.4g}, not "
            f"{wanted:.4g}: the converter has not taken all of the adapter; use --format merged"
        )
    return difference


def _convert(converter: Path, adapter: Path, source: ModelSource, target: Path) -> None:
    """Run the converter, in this interpreter's environment."""
    command = [sys.executable, str(converter), "--outtype", "f32", "--outfile", str(target)]
    with tempfile.TemporaryDirectory() as base:
        config = {**source.config.to_dict(), "architectures": [_architecture(source)]}
        (Path(base) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        command += ["--base", base, str(adapter)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no word of why"]
        raise ModelError(f"--format gguf: {converter.name} failed: {one_line(lines[-1])}")


def _architecture(source: ModelSource) -> str:
    named = getattr(source.config, "architectures", None) or [""]
    return str(named[0])


def _size(path: Path) -> float:
    """Return the Frobenius norm of all changes together, scaled as llama.cpp does it."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    total = 0.0
    for name, a_RI in tensors.items():
        if name.endswith(".lora_a"):
            b_OR = tensors[f"{name.removesuffix('a')}b"]
            scaled = Factors(b_OR, a_RI).scaled(alpha / a_RI.shape[0])
            total += norm(scaled) ** 2
    return math.sqrt(total)
