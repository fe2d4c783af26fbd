"""The files of a checkpoint: written with a manifest of their hashes, read only if all are whole.

    checkpoint-000200/
      state.json  engine.safetensors  ledger.safetensors
      manifest.json         format, step, and for each file its bytes and its SHA-256

Version 0.1.0 wrote no manifest (format 1); what it has left is read all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.results.json_text import json_text
from edge_sdk.errors import StorageError, one_line
from edge_sdk.files import is_damage, sync, write_synced

STATE, MANIFEST = "state.json", "manifest.json"
# Format of a run's folder. One that is written by a later version may be of a later one.
FORMAT = 2
Arrays = Mapping[str, Mapping[str, np.ndarray]]


class DamagedCheckpoint(StorageError):
    """A checkpoint is not as it was written; the message says why."""


def check_format(what: Path, found: object, version: object) -> None:
    """Refuse what a later version has written.

    Raises:
        StorageError: *found* is a format that is not known here.
    """
    if not isinstance(found, int) or found > FORMAT:
        raise StorageError(
            f"{what} is of format {found}, written by edgesplit {version}; edgesplit "
            f"{metadata.version('edgesplit')} reads formats up to {FORMAT}: install the later one"
        )


def write_files(folder: Path, step: int, state: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a checkpoint into an empty folder so that it survives a power cut.

    Args:
        folder: Where; nobody else knows of it yet.
        step: Step of the run that it is of.
        state: What fits into JSON.
        arrays: Tensors, by file and name.
    """
    from safetensors.numpy import save

    written: dict[str, dict[str, object]] = {}

    def write(name: str, data: bytes) -> None:
        written[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_synced(folder / name, data)

    for name, tensors in arrays.items():
        plain = {key: np.asarray(array, order="C") for key, array in tensors.items()}
        write(f"{name}.safetensors", save(plain))
    write(STATE, json_text({**state, "format": FORMAT}, indent=2).encode())
    about = {
        "format": FORMAT,
        "edgesplit": metadata.version("edgesplit"),
        "step": step,
        "files": written,
    }
    write_synced(folder / MANIFEST, _manifest_text(about).encode())
    sync(folder)


def _manifest_text(about: Mapping[str, Any]) -> str:
    """Return a manifest that carries its own hash."""
    plain = {name: value for name, value in about.items() if name != "sha256"}
    digest = hashlib.sha256(json_text(plain).encode()).hexdigest()
    return json_text({**plain, "sha256": digest}, indent=2) + "\n"


def read_files(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Return state and arrays of the checkpoint in *folder*, which is to be of *step*.

    Raises:
        DamagedCheckpoint: it is not as it was written.
        StorageError: it is of a later format, or cannot be read now.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    state, arrays = None, {}
    try:
        for name, data in _contents(folder, step):  # one at a time: they may be large
            if name == STATE:
                state = json.loads(data)
            else:
                arrays[Path(name).stem] = load(data)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        kind = DamagedCheckpoint if is_damage(error) else StorageError
        raise kind(f"cannot read {reason}") from error
    except (ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(one_line(error)) from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{STATE} is not as it was written")
    state.pop("format", None)
    return state, arrays


def _contents(folder: Path, step: int) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a checkpoint in order of their names, each checked as well as can be."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if STATE not in names:
        raise DamagedCheckpoint(f"{STATE} is missing")
    if MANIFEST not in names:
        yield from _without_manifest(folder, names)
        return
    about = _read_manifest(folder)
    check_format(folder, about["format"], about.get("edgesplit"))
    if about["step"] != step:
        raise DamagedCheckpoint(f"it is the one of step {about['step']}")
    files: dict[str, dict[str, object]] = about["files"]
    if strangers := set(names) - files.keys() - {MANIFEST}:
        raise DamagedCheckpoint(f"{min(strangers)} does not belong to it")
    for name, facts in sorted(files.items()):
        yield name, _whole(folder / name, facts)


def _read_manifest(folder: Path) -> dict[str, Any]:
    text = (folder / MANIFEST).read_text("utf-8")
    about = json.loads(text)
    if not isinstance(about, dict) or text != _manifest_text(about):
        raise DamagedCheckpoint(f"{MANIFEST} is not as it was written")
    return about


def _whole(path: Path, facts: Mapping[str, object]) -> bytes:
    if not path.exists():
        raise DamagedCheckpoint(f"{path.name} is missing")
    data = path.read_bytes()
    if len(data) != facts["bytes"]:
        raise DamagedCheckpoint(f"{path.name} has {len(data)} bytes instead of {facts['bytes']}")
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DamagedCheckpoint(f"{path.name} is not as it was written")
    return data


def _without_manifest(folder: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    state = json.loads((folder / STATE).read_bytes())
    if isinstance(state, dict) and "format" in state:
        raise DamagedCheckpoint(f"{MANIFEST} is missing")
    for name in names:
        if name == STATE or name.endswith(".safetensors"):
            yield name, (folder / name).read_bytes()
