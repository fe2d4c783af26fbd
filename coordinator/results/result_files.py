"""Whether the result of a run is still as it was exported: hashes in its events tell."""

from __future__ import annotations

import hashlib
from pathlib import Path

from coordinator.results.run_folder import RunFolder
from edge_sdk.files import storage_errors, sync


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an exported result, which survives a power cut now."""
    found = {}
    with storage_errors(folder):
        for path in sorted(folder.iterdir()):
            if path.is_file():
                sync(path)
                found[path.name] = _digest(path)
        sync(folder)
    return found


def is_whole(run: RunFolder, what: str) -> bool:
    """Return whether all files of the last export of *what* are as they were written."""
    rows = [row for row in run.rows("events.jsonl") if row.get("event") == f"{what}.exported"]
    files = rows[-1].get("files") if rows else None
    if not isinstance(files, dict) or not files:
        return False
    try:
        return all(_digest(run.path / what / name) == sha256 for name, sha256 in files.items())
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
